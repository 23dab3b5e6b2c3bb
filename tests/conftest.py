"""Strictness for every run: rank promotion raises; pyproject.toml makes every warning an error."""

import gc

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Almost every program here runs once: a code generator's work on it is not repaid. Results don't
# depend on it.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def forgetting():
    """Drop each module's programs, of which no other has a use: thousands fill the memory."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def strict_dtypes():
    """Strict dtype promotion, for code that calls no optax function."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """64-bit mode, restored afterwards."""
    with jax.enable_x64(True):
        yield

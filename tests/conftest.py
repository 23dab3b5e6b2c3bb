"""Strictness for every run: rank promotion raises; pyproject.toml makes every warning an error."""

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


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

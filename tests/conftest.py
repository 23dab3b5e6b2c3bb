"""Make every run strict: rank promotion raises. (pyproject.toml turns warnings into errors.)"""

import gc
import os

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Almost every program here runs once, so optimising it doesn't pay off, and no tolerance depends on
# it. XLA reads its flags when the first array is created.
jax.config.update("jax_disable_most_optimizations", True)


def xla_flags(version):
    """Return flags that save work, for versions that know them: unknown flags end the process."""
    if version >= (0, 11):
        return []
    return ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]


os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), *xla_flags(jax.__version_info__)]
)


@pytest.fixture(autouse=True, scope="module")
def forgetting():
    """Drop the programs that each module compiled: thousands of them would fill the memory."""
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

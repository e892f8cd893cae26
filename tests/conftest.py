"""Test set-up: one CPU device (eight for ``-m mesh``), strict shapes, one compilation cache."""

import os

import pytest

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
MESH_DEVICES = "--xla_force_host_platform_device_count=8"


def pytest_configure(config: pytest.Config) -> None:
    # Before jax counts devices; workers of xdist inherit it.
    if config.option.markexpr == "mesh" and MESH_DEVICES not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {MESH_DEVICES}".strip()
    cache = os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "jax")
    )
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_default_matmul_precision", "highest")

"""Test set-up: one CPU device (eight for ``-m mesh``), strict shapes, one compilation cache."""

import os

import pytest

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Most of the time would go into compiling; launch.verify and the main job run what users run.
QUICK = "--xla_backend_optimization_level=0"
MESH_DEVICES = "--xla_force_host_platform_device_count=8"


def pytest_configure(config: pytest.Config) -> None:
    # Before jax counts devices; workers of xdist and commands in processes inherit it.
    flags = os.environ.get("XLA_FLAGS", "").split()
    asked = [QUICK, MESH_DEVICES] if config.option.markexpr == "mesh" else [QUICK]
    os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys([*flags, *asked]))
    cache = os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "jax")
    )
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_numpy_rank_promotion", "raise")

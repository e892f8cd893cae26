"""Test set-up: one CPU device (eight for ``-m mesh``), strict shapes, one compilation cache."""

import os

import pytest

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
MESH_DEVICES = "--xla_force_host_platform_device_count=8"
# Of many small programs: what they take is mostly the compiler's time. Slow tests and commands run
# what users run.
QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]


def pytest_configure(config: pytest.Config) -> None:
    import jax

    quick = QUICK[: 2 if jax.__version_info__ < (0, 11) else 1]  # XLA ends at a flag it lost
    asked = {"mesh": [MESH_DEVICES], "slow": [], "soak": []}.get(config.option.markexpr, quick)
    # Before jax counts devices; workers of xdist and commands in processes inherit it.
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys([*flags, *asked]))
    cache = os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "jax")
    )
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """(config, work directory) of the run that all tests share."""
    from tiny_run import shared_run

    return shared_run(tmp_path_factory.getbasetemp())

"""Compiles a run's programs for a machine that need not be here, and says what they take of it.

python -m launch.compile --config=configs/pythia410m_gpt2medium.py --machine=v5e-8

Needs no weights, no text and no accelerator; for TPUs `pip install "jax[tpu]"`, for NVIDIA's
`pip install "jax[cuda13]"`. Exits with 2 where a program does not fit.
"""

import os

from crossdict_jax.compile.machines import ENVIRONMENT
from launch import command


def main(config, work):
    import jax

    # Compilers of others are asked for programs alone, which only their devices can load.
    jax.config.update("jax_enable_compilation_cache", False)
    from crossdict_jax.compile.report import compile_run

    compile_run(config)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT | os.environ | {"JAX_PLATFORMS": "cpu"})  # as JAX starts
    command.run(main, writes=False)

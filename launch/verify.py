"""Runs the gates: planted truths through the whole machine, and prints a table of what came out.

python -m launch.verify
python -m launch.verify --config.gates=G1,G3 --workdir=runs/verify-some

Exits with 1 if a gate misses. Every run computes everything anew.
"""

from crossdict_jax.config import VerifyConfig
from launch import command


def main(config, work):
    from crossdict_jax.verify.gate import verify

    if verify(config, work):
        raise SystemExit(1)


if __name__ == "__main__":
    command.run(main, kind=VerifyConfig, default="verify")

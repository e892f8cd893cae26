"""Runs every model on held-out text with its residual stream replaced by what a map gives, and
with single features of another model put in.

python -m launch.intervene --workdir=runs/ab
"""

from launch import command


def main(config, work):
    from crossdict_jax.causal import intervene, transfer_features

    intervene(config, work)
    transfer_features(config, work)


if __name__ == "__main__":
    command.run(main, table="causal_table")

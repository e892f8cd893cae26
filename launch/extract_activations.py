"""Reads the text with every model and stores the residual stream at paired positions.

python -m launch.extract_activations --models=a,b --layers=5,6,7 --workdir=runs/ab
"""

from launch import command


def main(config, work):
    from crossdict_jax.activations.extract import extract
    from crossdict_jax.activations.untrained import extract_untrained
    from crossdict_jax.dictionaries.pretrained import check_sources

    if not (work.activations / "meta.json").exists():  # else the next stage tells a wrong one
        check_sources(config, work)
    store = extract(config, work)
    if "untrained" in config.controls:
        extract_untrained(config, work, store)


if __name__ == "__main__":
    command.run(main, table="pairing_table")

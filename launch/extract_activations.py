"""Reads the text with every model and stores the residual stream at paired positions.

python -m launch.extract_activations --models=a,b --layers=5,6,7 --workdir=runs/ab
"""

from launch import command


def main(config, work):
    from crossdict_jax.activations.extract import extract
    from crossdict_jax.activations.untrained import extract_untrained
    from crossdict_jax.config import model_layers
    from crossdict_jax.dictionaries import load

    if not work.activations.exists():  # the next stage would find a wrong one after hours
        for source, layers in zip(config.sae.sources, model_layers(config)):
            for layer in layers if source != "train" else ():
                load(source.replace("{layer}", str(layer)))
    store = extract(config, work)
    if "untrained" in config.controls:
        extract_untrained(config, work, store)


if __name__ == "__main__":
    command.run(main, table="pairing_table")

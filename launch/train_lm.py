"""Trains a small language model of our own on any corpus, into a Hugging Face folder.

python -m launch.train_lm --config=configs/docs_gpt2.py --workdir=runs/docs-gpt2

The model lies in WORKDIR/model and its loss curve in WORKDIR/loss.svg; the held-out loss is printed
beside what counting gives.
"""

from crossdict_jax.config import PretrainConfig
from launch import command


def main(config, work):
    from crossdict_jax.pretraining import train_language_model

    result = train_language_model(config, work.root)
    print("Held-out nats per token:")
    for name in ("loss", "bigram_loss", "unigram_loss"):
        print(f"  {name.removesuffix('_loss').replace('loss', 'model'):<8} {result[name]:.3f}")
    print(work.root / "model")


if __name__ == "__main__":
    command.run(main, kind=PretrainConfig, default="docs_gpt2")

"""Trains a small language model of our own on any corpus, into a Hugging Face folder.

python -m launch.train_lm --config=configs/docs_gpt2.py --workdir=runs/docs-gpt2

The model lies in WORKDIR/model, the curve of its loss in WORKDIR/metrics.jsonl; the held-out loss
is printed beside what counting gives.
"""

from crossdict_jax.config import PretrainConfig
from launch import command


def main(config, work):
    from crossdict_jax.pretraining import train_language_model
    from crossdict_jax.report.tables import show, table

    result = train_language_model(config, work.root)
    losses = {"model": "loss", "bigram": "bigram_loss", "unigram": "unigram_loss"}
    cells = {title: f"{result[name]:.3f}" for title, name in losses.items()}
    show([table("Held-out nats per token", [cells])])
    print(work.root / "model")


if __name__ == "__main__":
    command.run(main, kind=PretrainConfig, default="docs_gpt2")

"""What runs under the peer's own Python: trains SAELens dictionaries on rows from a folder.

PYTHON saelens_peer.py FOLDER

FOLDER holds rows.npy [n, d_model], order.npy [steps, batch] and jobs.json. Each job's dictionary is
written to a folder of its own as SAELens writes it, with seconds.json beside its weights.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np


def main(folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    rows = torch.from_numpy(np.load(folder / "rows.npy"))
    order = torch.from_numpy(np.load(folder / "order.npy")).long()
    for job in json.loads((folder / "jobs.json").read_text()):
        out = folder / job["name"]
        if not (out / "seconds.json").exists():
            train(job, rows, order, out)
            print(job["name"], flush=True)


def train(job: dict, rows, order, out: Path) -> None:
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    sae_class, config_class = get_sae_training_class(job["architecture"])
    sae = sae_class(config_class(d_in=rows.shape[1], **job["dictionary"]))
    steps, batch = order.shape
    settings = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        n_batches_for_norm_estimate=min(steps, 20),
        logger=LoggingConfig(log_to_wandb=False),
        **job["trainer"],
    )
    started = time.perf_counter()
    SAETrainer(cfg=settings, sae=sae, data_provider=batches(rows, order)).fit()
    seconds = time.perf_counter() - started
    sae.save_inference_model(str(out))
    about = {"seconds": seconds, "version": sae_lens.__version__}
    (out / "seconds.json").write_text(json.dumps(about))


def batches(rows, order):
    """Yields the batches in order, for ever: estimating the scale reads some of them first."""
    while True:
        for places in order:
            yield rows[places]


if __name__ == "__main__":
    main(Path(sys.argv[1]))

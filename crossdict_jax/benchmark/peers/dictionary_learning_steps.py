"""Training steps of dictionary_learning: its own trainers and defaults, rows from a folder."""

from importlib.metadata import version
from pathlib import Path

import numpy as np


def make(folder: str, architecture: str, width: int, k: int):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.from_numpy(np.load(Path(folder) / "rows.npy")).to(device)
    order = torch.from_numpy(np.load(Path(folder) / "order.npy")).long().to(device)
    settings = {"steps": 10**6, "activation_dim": rows.shape[1], "dict_size": width}
    settings |= {"layer": 0, "lm_name": "none", "device": device, "seed": 0}
    trainer = _trainer(architecture)(**settings, **({"k": k} if "topk" in architecture else {}))
    done = 0

    def run(steps: int) -> None:
        nonlocal done
        for _ in range(steps):
            trainer.update(done, rows[order[done % len(order)]])
            done += 1
        if device == "cuda":
            torch.cuda.synchronize()

    return run, {"version": version("dictionary-learning"), "torch": torch.__version__}


def _trainer(architecture: str):
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    return {
        "relu": StandardTrainerAprilUpdate,
        "topk": TopKTrainer,
        "batchtopk": BatchTopKTrainer,
        "jumprelu": JumpReluTrainer,
    }[architecture]

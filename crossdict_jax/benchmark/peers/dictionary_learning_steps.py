"""Training steps of dictionary_learning: its own trainers and defaults, rows from a folder."""

import itertools
from importlib.metadata import version


def make(folder: str, architecture: str, width: int, k: int):
    import torch
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer
    from serve import device, repeated, training_rows

    trainers = {
        "relu": StandardTrainerAprilUpdate,
        "topk": TopKTrainer,
        "batchtopk": BatchTopKTrainer,
        "jumprelu": JumpReluTrainer,
    }
    rows, batches = training_rows(folder)
    settings = {"steps": 10**6, "activation_dim": rows.shape[1], "dict_size": width}
    settings |= {"layer": 0, "lm_name": "none", "device": device(), "seed": 0}
    if "topk" in architecture:
        settings["k"] = k
    trainer, numbers = trainers[architecture](**settings), itertools.count()
    run = repeated(lambda: trainer.update(next(numbers), next(batches)))
    return run, {"version": version("dictionary-learning"), "torch": torch.__version__}

"""SAELens on rows and an order from a folder: steps that are timed, or a training that is saved."""

from itertools import chain
from pathlib import Path

KINDS = {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}  # ours: theirs
RATE = 3e-4  # their default


def make(
    folder: str, architecture: str, width: int, k: int, *, name: str = "", training=None, **chosen
):
    """Trains to the end and saves in folder/name if there is a name; ``training`` has lr, steps.

    ``chosen`` are dictionary settings that differ from their defaults.
    """
    import sae_lens
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer
    from serve import device, repeated, training_rows

    torch.manual_seed(0)
    (rows, batches), kind = training_rows(folder), KINDS.get(architecture, architecture)
    first = next(batches)
    sae_class, config_class = get_sae_training_class(kind)
    chosen |= {"k": k} if "topk" in kind else {}
    sae = sae_class(config_class(d_in=rows.shape[1], d_sae=width, device=device(), **chosen))
    about = {"lr": RATE, "steps": 10**6} | (training or {})
    settings = SAETrainerConfig(
        total_training_samples=about["steps"] * len(first),
        train_batch_size_samples=len(first),
        n_batches_for_norm_estimate=min(about["steps"], 20),
        device=device(),
        logger=LoggingConfig(log_to_wandb=False),
        lr=about["lr"],
        lr_end=about["lr"] / 10 if name else about["lr"],  # as their runner has it
    )
    trainer = SAETrainer(cfg=settings, sae=sae.to(device()), data_provider=chain([first], batches))
    version = {"version": sae_lens.__version__, "torch": torch.__version__}
    if name:
        trainer.fit()
        sae.save_inference_model(str(Path(folder) / name))
        return None, version

    def step() -> None:
        trainer.step(next(batches))
        trainer.n_training_steps += 1

    return repeated(step), version

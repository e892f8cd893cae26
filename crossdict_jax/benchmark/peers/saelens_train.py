"""Trains a dictionary with SAELens on rows from a folder, and writes it as SAELens writes it."""

from pathlib import Path


def make(folder: str, name: str, architecture: str, dictionary: dict, trainer: dict):
    import sae_lens
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer
    from serve import device, training_rows

    torch.manual_seed(0)
    rows, batches = training_rows(folder)
    sae_class, config_class = get_sae_training_class(architecture)
    sae = sae_class(config_class(d_in=rows.shape[1], device=device(), **dictionary)).to(device())
    batch, steps = trainer["batch"], trainer["steps"]
    settings = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        n_batches_for_norm_estimate=min(steps, 20),
        device=device(),
        logger=LoggingConfig(log_to_wandb=False),
        lr=trainer["lr"],
        lr_end=trainer["lr"] / 10,  # as their runner has it
    )
    SAETrainer(cfg=settings, sae=sae, data_provider=batches).fit()
    sae.save_inference_model(str(Path(folder) / name))
    return None, {"version": sae_lens.__version__}

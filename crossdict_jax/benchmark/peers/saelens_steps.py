"""Training steps of SAELens: its own trainer and defaults, on rows and an order from a folder."""

KINDS = {"relu": "standard"}  # ours: theirs


def make(folder: str, architecture: str, width: int, k: int):
    import sae_lens
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer
    from serve import device, repeated, training_rows

    rows, batches = training_rows(folder)
    sae_class, config_class = get_sae_training_class(KINDS.get(architecture, architecture))
    chosen = {"k": k} if "topk" in architecture else {}
    config = config_class(d_in=rows.shape[1], d_sae=width, device=device(), **chosen)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=len(next(batches)),
            lr_end=3e-4,  # their default rate, kept to the end
            device=device(),
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae_class(config).to(device()),
        data_provider=iter(()),
    )

    def step() -> None:
        trainer.step(next(batches))
        trainer.n_training_steps += 1

    return repeated(step), {"version": sae_lens.__version__, "torch": torch.__version__}

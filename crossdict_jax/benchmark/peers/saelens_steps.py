"""Training steps of SAELens: its own trainer and defaults, on rows and an order from a folder."""

from pathlib import Path

import numpy as np

ARCHITECTURES = {  # ours: theirs
    "relu": "standard",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "jumprelu": "jumprelu",
}


def make(folder: str, architecture: str, width: int, k: int):
    import sae_lens
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.from_numpy(np.load(Path(folder) / "rows.npy")).to(device)
    order = torch.from_numpy(np.load(Path(folder) / "order.npy")).long().to(device)
    sae_class, config_class = get_sae_training_class(ARCHITECTURES[architecture])
    chosen = {"k": k} if architecture in ("topk", "batchtopk") else {}
    config = config_class(d_in=rows.shape[1], d_sae=width, device=device, **chosen)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=order.shape[1],
            lr_end=3e-4,  # their default rate, kept to the end
            device=device,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae_class(config).to(device),
        data_provider=iter(()),
    )

    def run(steps: int) -> None:
        for _ in range(steps):
            trainer.step(rows[order[trainer.n_training_steps % len(order)]])
            trainer.n_training_steps += 1
        if device == "cuda":
            torch.cuda.synchronize()

    return run, {"version": sae_lens.__version__, "torch": torch.__version__}

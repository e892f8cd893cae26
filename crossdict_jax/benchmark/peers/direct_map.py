"""A three-layer map whose correlation loss is taken as it is written: from width x width matrices.

Settings as usual for this map: LayerNorm, ReLU, dropout 0.1, AdamW, gradients clipped at 1.
"""

from pathlib import Path

import numpy as np


def make(folder: str, hidden: int, batch_size: int):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with np.load(Path(folder) / "features.npz", allow_pickle=False) as file:
        a, b = (torch.from_numpy(file[name]).to(device) for name in ("a", "b"))
    network = _network(torch.nn, a.shape[1], hidden, b.shape[1]).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-4)
    done = 0

    def step(f_a, f_b) -> None:
        optimizer.zero_grad()
        _loss(torch, network(f_a), f_b).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    def run(steps: int) -> None:
        nonlocal done
        for _ in range(steps):
            at = done * batch_size % len(a)
            step(a[at : at + batch_size], b[at : at + batch_size])
            done += 1
        if device == "cuda":
            torch.cuda.synchronize()

    return run, {"version": torch.__version__}


def _network(nn, width_a: int, hidden: int, width_b: int):
    def layer(d_in: int) -> list:
        return [nn.Linear(d_in, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(0.1)]

    return nn.Sequential(*layer(width_a), *layer(hidden), nn.Linear(hidden, width_b))


def _loss(torch, p, t):
    """MSE + cosine + 0.05 correlation + 0.01 sparsity, as our own map weighs them."""
    functional = torch.nn.functional
    cosine = 1 - functional.cosine_similarity(p, t, dim=1).mean()
    # Columns that are constant in a batch have no correlation: 0.
    p_corr, t_corr = (torch.nan_to_num(torch.corrcoef(x.T)) for x in (p, t))
    correlation = functional.mse_loss(p_corr, t_corr)
    sparsity = ((p == 0).float() - (t == 0).float()).square().mean()
    return functional.mse_loss(p, t) + cosine + 0.05 * correlation + 0.01 * sparsity

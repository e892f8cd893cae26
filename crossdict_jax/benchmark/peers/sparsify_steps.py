"""Training steps of sparsify, as its trainer takes them, with Adam as all others here."""

from importlib.metadata import version
from pathlib import Path

import numpy as np


def make(folder: str, architecture: str, width: int, k: int):
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.from_numpy(np.load(Path(folder) / "rows.npy")).to(device)
    order = torch.from_numpy(np.load(Path(folder) / "order.npy")).long().to(device)
    config = SparseCoderConfig(activation=architecture, num_latents=width, k=k)
    coder = SparseCoder(rows.shape[1], config, device=device)
    coder.b_dec.data = rows.mean(0)
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4 / (width / 2**14) ** 0.5)
    silent = torch.zeros(width, dtype=torch.long, device=device)
    done = 0

    def step(x) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        fired = torch.zeros(width, dtype=torch.bool, device=device)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(x))
        silent[fired] = 0

    def run(steps: int) -> None:
        nonlocal done
        for _ in range(steps):
            step(rows[order[done % len(order)]])
            done += 1
        if device == "cuda":
            torch.cuda.synchronize()

    return run, {"version": version("eai-sparsify"), "torch": torch.__version__}

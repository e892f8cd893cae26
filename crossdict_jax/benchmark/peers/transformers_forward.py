"""Layers of a GPT-2 read with transformers on torch: all hidden states, batches as they come."""

from pathlib import Path

import numpy as np


def make(folder: str, layers: list[int], batch_size: int, cut: bool):
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.GPT2Model.from_pretrained(Path(folder) / "model")  # no dropout
    if cut:  # the highest layer asked for is the last hidden state
        model.h, model.ln_f = model.h[: max(layers)], torch.nn.Identity()
    model.to(device)
    windows = _windows(Path(folder))

    def forward(some):
        longest = max(map(len, some))
        tokens = torch.zeros(len(some), longest, dtype=torch.long)
        for row, window in zip(tokens, some):
            row[: len(window)] = torch.from_numpy(window)
        # Padding is on the right, and attention looks to the left: no mask changes what counts.
        return model(tokens.to(device), output_hidden_states=True, use_cache=False).hidden_states

    @torch.inference_mode()
    def run(times: int) -> None:
        for _ in range(times):
            for at in range(0, len(windows), batch_size):
                hidden = forward(windows[at : at + batch_size])
                kept = [hidden[layer].to(torch.bfloat16).cpu() for layer in layers]
        del kept

    with torch.inference_mode():
        hidden = forward(windows[:1])
        first = torch.stack([hidden[layer][0] for layer in layers]).float().cpu().numpy()
    np.save(Path(folder) / "captured.npy", first)
    return run, {"version": transformers.__version__, "torch": torch.__version__}


def _windows(folder: Path) -> list[np.ndarray]:
    with np.load(folder / "windows.npz", allow_pickle=False) as file:
        return np.split(file["tokens"].astype(np.int64), np.cumsum(file["lengths"])[:-1])

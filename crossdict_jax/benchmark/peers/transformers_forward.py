"""Layers of a GPT-2 read with transformers on torch: all hidden states, batches as they come."""

from pathlib import Path

import numpy as np


def make(folder: str, layers: list[int], batch_size: int, cut: bool):
    import torch
    import transformers
    from serve import device, repeated

    model = transformers.GPT2Model.from_pretrained(Path(folder) / "model")  # no dropout
    if cut:  # the highest layer asked for is the last hidden state
        model.h, model.ln_f = model.h[: max(layers)], torch.nn.Identity()
    model.to(device())
    with np.load(Path(folder) / "windows.npz", allow_pickle=False) as file:
        windows = np.split(file["tokens"].astype(np.int64), np.cumsum(file["lengths"])[:-1])

    @torch.inference_mode()
    def read() -> None:
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            tokens = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
            for row, window in zip(tokens, batch):
                row[: len(window)] = torch.from_numpy(window)
            # Padding is on the right, and attention looks to the left: no mask is needed.
            hidden = model(tokens.to(device()), output_hidden_states=True, use_cache=False)
            for layer in layers:
                hidden.hidden_states[layer].to(torch.bfloat16).cpu()

    return repeated(read), {"version": transformers.__version__, "torch": torch.__version__}

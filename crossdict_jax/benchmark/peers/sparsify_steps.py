"""Training steps of sparsify, as its trainer takes them, with Adam as all others here."""

from importlib.metadata import version


def make(folder: str, architecture: str, width: int, k: int):
    import torch
    from serve import device, repeated, training_rows
    from sparsify import SparseCoder, SparseCoderConfig

    rows, batches = training_rows(folder)
    config = SparseCoderConfig(activation=architecture, num_latents=width, k=k)
    coder = SparseCoder(rows.shape[1], config, device=device())
    coder.b_dec.data = rows.mean(0)
    optimizer = torch.optim.Adam(coder.parameters(), lr=2e-4 / (width / 2**14) ** 0.5)
    silent = torch.zeros(width, dtype=torch.long, device=device())

    def step() -> None:
        x = next(batches)
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        fired = torch.zeros(width, dtype=torch.bool, device=device())
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(x))
        silent[fired] = 0

    return repeated(step), {"version": version("eai-sparsify"), "torch": torch.__version__}

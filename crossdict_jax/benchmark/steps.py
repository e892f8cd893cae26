"""One training step of a dictionary: ours, through the loop, beside three other libraries'."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crossdict_jax.activations.store import Store
from crossdict_jax.benchmark.harness import OURS, Need, Spent, alternate, compared, timed
from crossdict_jax.benchmark.peer import Peer, absent
from crossdict_jax.benchmark.rows import MODEL, SITE, make_store
from crossdict_jax.benchmark_config import BenchmarkConfig, StepBenchmark
from crossdict_jax.config import SAEConfig
from crossdict_jax.dictionaries.train import members, prepare
from crossdict_jax.training.loop import MAX_CHUNK, Chunks, Feed, Trainable, epoch_order, initial

MANY = 1_000_000  # steps of the schedules: none is at its end while it is timed
PEERS = {  # library: (its file in peers/, what it can train)
    "sae-lens": ("saelens_steps.py", ("relu", "topk", "batchtopk", "jumprelu")),
    "sparsify": ("sparsify_steps.py", ("topk",)),
    "dictionary_learning": (
        "dictionary_learning_steps.py",
        ("relu", "topk", "batchtopk", "jumprelu"),
    ),
}


class Steps:
    """A training that stands still between runs of a few steps, in the loop's own program.

    Args:
      most: steps of one run at most: rows that come from the host are sent for so many.
    """

    def __init__(self, trainable: Trainable, feed: Feed, state_shardings, *, most: int = MAX_CHUNK):
        root = jax.random.key(0)
        self._run = Chunks(trainable, feed, root, most=most)
        self._state = jax.block_until_ready(initial(trainable, root, state_shardings))
        self._done = 0

    def run(self, count: int) -> Spent:
        """Takes so many steps; returns what that took."""
        return timed(lambda: self._take(count))

    def memory(self) -> int | None:
        """Returns the bytes that a training says at its start it will hold."""
        return self._run.memory(self._state)

    def _take(self, count: int):
        self._state, metrics = self._run(self._state, self._done, count)
        self._done += count
        return self._state, metrics


def dictionary_steps(
    sae: SAEConfig, store: Store, *, resident: bool | None = None, most: int = MAX_CHUNK
) -> Steps:
    """Returns the training of all that ``sae`` asks for at the store's site, as one ensemble.

    Args:
      resident: see ``prepare``.
      most: see ``Steps``.
    """
    group, rows = members(sae, [(MODEL, SITE)]), store.select("train")
    ensemble = prepare(sae, store, group, rows, resident=resident)
    return Steps(ensemble.trainable, ensemble.feed, ensemble.by_member, most=most)


def sae_config(config: StepBenchmark, architecture: str, **other) -> SAEConfig:
    """Returns the settings of a training of one architecture."""
    shared = {name: getattr(config, name) for name in ("width", "k", "batch_size", "matmul_dtype")}
    return SAEConfig(architecture=architecture, steps=MANY, **shared | other)


def need(sae: SAEConfig, d_model: int, *, steps: int, count: int = 1) -> Need:
    """Returns what so many steps of ``count`` members need at least.

    Flops: 10 B d F where every feature may be active (two products forward, three backward); where
    k are, one dense product to find them, and four with k in place of F. Bytes: parameters, their
    gradients and both moments read and written, the rows read, and where features are dense,
    those written once and read twice.
    """
    B, F, k = sae.batch_size, sae.width, sae.k
    dense = sae.architecture in ("relu", "jumprelu", "gated")
    flops = 10 * B * d_model * F if dense else 2 * B * d_model * F + 8 * B * d_model * k
    parameters = 2 * d_model * F + F + d_model
    traffic = 4 * (8 * parameters + (3 * B * F if dense else 4 * B * k)) + 2 * B * d_model
    total = steps * count
    return Need(total * B, "rows", total * flops, total * traffic, sae.matmul_dtype)


def benchmark(config: BenchmarkConfig, folder: Path, ceilings: dict) -> Iterator[dict[str, Any]]:
    """Yields rows: each architecture against every peer, then ours against one another."""
    own = config.steps
    store = make_store(folder / "store", own.rows, own.d_model, seed=config.seed)
    _hand_over(folder, store, own.batch_size)
    missing = {library: reason for library in PEERS if (reason := absent(library))}
    for line in missing.values():
        print(line)
    with ExitStack() as stack:
        peers = {
            library: stack.enter_context(Peer(library, file))
            for library, (file, _) in PEERS.items()
            if library not in missing
        }
        for architecture in own.architectures:
            yield from _against_peers(config, architecture, store, peers, folder, ceilings)
    if len(own.architectures) > 1:
        yield from _among_ours(config, store, ceilings)


def _hand_over(folder: Path, store: Store, batch: int) -> None:
    """Writes rows and their order for the peers: the same that ours are trained on."""
    rows = store.read(MODEL, SITE, store.select("train"))
    steps = len(rows) // batch
    order = epoch_order(0, start=0, count=steps * batch, n=len(rows))
    np.save(folder / "rows.npy", rows.astype(np.float32))
    np.save(folder / "order.npy", order.reshape(steps, batch))


def _against_peers(config, architecture, store, peers, folder, ceilings):
    own = config.steps
    sae = sae_config(own, architecture)
    ours = dictionary_steps(sae, store)
    contenders = {OURS: lambda: ours.run(own.steps)}
    about = {}
    for library, peer in peers.items():
        if architecture in PEERS[library][1]:
            shape = {"architecture": architecture, "width": own.width, "k": own.k}
            about[library] = peer.make(folder=str(folder), **shape)
            contenders[library] = lambda peer=peer: peer.run(own.steps)
    spent = alternate(contenders, repeats=config.repeats)
    amount = need(sae, own.d_model, steps=own.steps)
    yield from compared("steps", architecture, spent, amount, ceilings=ceilings, about=about)


def _among_ours(config, store, ceilings):
    """Rows of all our architectures, each held against the first."""
    own = config.steps
    trainings = {a: dictionary_steps(sae_config(own, a), store) for a in own.architectures}
    contenders = {a: lambda t=t: t.run(own.steps) for a, t in trainings.items()}
    spent = alternate(contenders, repeats=config.repeats)
    first = own.architectures[0]
    amount = Need(own.steps * own.batch_size)
    yield from compared("steps", "ours", spent, amount, ceilings={}, reference=first)

"""One training step of a dictionary: ours, through the loop, beside three other libraries'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crossdict_jax import modules
from crossdict_jax.activations.store import Store
from crossdict_jax.benchmark.harness import OURS, Need, Spent, alternate, compared, timed
from crossdict_jax.benchmark.peer import Peer, absent
from crossdict_jax.benchmark.rows import MODEL, SITE, make_store
from crossdict_jax.benchmark_config import BenchmarkConfig, StepBenchmark
from crossdict_jax.config import SAEConfig
from crossdict_jax.config.settings import has_k
from crossdict_jax.dictionaries.train import members, prepare
from crossdict_jax.ops.selection import kth_largest
from crossdict_jax.training.loop import MAX_CHUNK, Chunks, Feed, Trainable, epoch_order, initial

MANY = 1_000_000  # steps of the schedules: none is at its end while it is timed
FOLLOW = ("relu",)  # architectures whose steps cost less where fewer features are active
QUIET = "ours, few active"
SAMPLE = 1024  # rows that tell when few features are active
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

    Attributes:
      metrics: of the last run, arrays [most, ...].
    """

    def __init__(self, trainable: Trainable, feed: Feed, state_shardings, *, most: int = MAX_CHUNK):
        root = jax.random.key(0)
        self._run = Chunks(trainable, feed, root, most=most)
        self._state = jax.block_until_ready(initial(trainable, root, state_shardings))
        self._done, self.metrics = 0, {}

    def run(self, count: int) -> Spent:
        """Takes so many steps; returns what that took."""
        return timed(lambda: self._take(count))

    def memory(self) -> int | None:
        """Returns the bytes that a training says at its start it will hold."""
        return self._run.memory(self._state)

    def _take(self, count: int):
        self._state, metrics = self._run(self._state, self._done, count)
        self._done += count
        self.metrics = metrics
        return self._state, metrics


def dictionary_steps(
    sae: SAEConfig,
    store: Store,
    *,
    resident: bool | None = None,
    most: int = MAX_CHUNK,
    l0: int | None = None,
) -> Steps:
    """Returns the training of all that ``sae`` asks for at the store's site, as one ensemble.

    Args:
      resident: see ``prepare``.
      most: see ``Steps``.
      l0: active features a row to start with, as if trained; None: as trainings start.
    """
    group, rows = members(sae, [(MODEL, SITE)]), store.select("train")
    ensemble = prepare(sae, store, group, rows, resident=resident)
    trainable = ensemble.trainable
    if l0 is not None:
        x = store.read(MODEL, SITE, rows[:SAMPLE]).astype(np.float32)
        trainable = Trainable(_quieted(trainable.init, ensemble.graphdef, x, l0), trainable.step)
    return Steps(trainable, ensemble.feed, ensemble.by_member, most=most)


def _quieted(init: Callable, graphdef, x: np.ndarray, l0: int) -> Callable:
    """An ``init`` whose encoders' biases are so low that l0 features a row of x [n, d] are active.

    Rates and penalties are next to 0 at the start of so long schedules: it stays so.
    """

    def quiet(params):
        d = modules.merge(graphdef, params)
        z = jax.nn.relu(d.pre_activations(d.scaled_pair(x, None)[0]))
        return params | {"b_enc": params["b_enc"] - kth_largest(z, l0 * len(x), axis=(0, 1))}

    def quieted(root):
        state = init(root)
        return state | {"params": jax.vmap(quiet)(state["params"])}

    return quieted


def sae_config(config: StepBenchmark, architecture: str, **other) -> SAEConfig:
    """Returns the settings of a training of one architecture."""
    shared = {name: getattr(config, name) for name in ("width", "k", "batch_size", "matmul_dtype")}
    return SAEConfig(architecture=architecture, steps=MANY, **shared | other)


def need(
    sae: SAEConfig, d_model: int, *, steps: int, count: int = 1, l0: int | None = None
) -> Need:
    """Returns what so many steps of ``count`` members need at least.

    Args:
      l0: active features a row, where the architecture does not fix them; None: perhaps all.

    Flops: 10 B d F where every feature may be active (two products forward, three backward); where
    k are, one dense product to find them, and four with k in place of F. Bytes: parameters, their
    gradients and both moments read and written, the rows read, and where features are dense,
    those written once and read twice.
    """
    B, F, k = sae.batch_size, sae.width, sae.k if l0 is None else l0
    dense = not has_k(sae.architecture) and l0 is None
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
    ours = {OURS: dictionary_steps(sae, store)}
    if architecture in FOLLOW:
        ours[QUIET] = dictionary_steps(sae, store, l0=own.k)
    contenders = {name: lambda t=training: t.run(own.steps) for name, training in ours.items()}
    about = {}
    for library, peer in peers.items():
        if architecture in PEERS[library][1]:
            shape = {"architecture": architecture, "width": own.width, "k": own.k}
            about[library] = peer.make(folder=str(folder), **shape)
            contenders[library] = lambda peer=peer: peer.run(own.steps)
    spent = alternate(contenders, repeats=config.repeats)
    theirs = {library: spent[library] for library in about}
    for name, training in ours.items():
        few = own.k if name == QUIET else None
        case = architecture if few is None else f"{architecture}, {few} active a row"
        about[OURS] = {"l0": float(training.metrics["l0"][0, 0])}
        yield from compared(
            "steps",
            case,
            {OURS: spent[name]} | theirs,
            need(sae, own.d_model, steps=own.steps, l0=few),
            ceilings=ceilings,
            about=about,
        )


def _among_ours(config, store, ceilings):
    """Rows of all our architectures, each held against the first."""
    own = config.steps
    trainings = {a: dictionary_steps(sae_config(own, a), store) for a in own.architectures}
    contenders = {a: lambda t=t: t.run(own.steps) for a, t in trainings.items()}
    spent = alternate(contenders, repeats=config.repeats)
    first = own.architectures[0]
    amount = Need(own.steps * own.batch_size)
    yield from compared("steps", "ours", spent, amount, ceilings={}, reference=first)

"""The training loop: fused steps, exact resume, metrics, NaN checks, a progress bar.

The order of one turn, where it binds:

1. restore the newest sealed checkpoint, or initialise (a function of the seed alone);
2. dispatch a chunk of steps: one compiled program for any number of steps, one per variant;
3. only then read the metrics of the chunk before (bounds the work in flight);
4. checkpoint between chunks, never inside one, and when somebody asks the process to stop: the
   state is copied to the host, then a thread writes and seals it, one at a time.

Data order is a pure function of (seed, step), so a run that was killed ends with the same bits.
"""

import contextlib
import dataclasses
import functools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from crossdict_jax.errors import UserError
from crossdict_jax.training import checkpoint
from crossdict_jax.training.mesh import compiler_options, shard
from crossdict_jax.training.metrics import MetricsWriter
from crossdict_jax.training.stage import progress_bar
from crossdict_jax.workdir import check_space, say, write_json

MAX_CHUNK = 50  # steps per dispatch
CHECKPOINT_SECONDS = 600.0  # at most, besides steps: large steps are slow, and machines pre-empted
BLOCK = 64  # rows: of 1024 numbers the 128 KiB that Linux reads ahead of a memory map
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What the loop trains: pure functions over pytrees.

    Attributes:
      init: key -> {"params": pytree, "train": pytree}; ``train`` is what only training needs.
      step: (state, batch, step number, key, variant) -> (state, {name: array}).
      variant: state -> what is static in the next chunk; each has its own program.
    """

    init: Callable[[jax.Array], PyTree]
    step: Callable[..., tuple[PyTree, dict[str, jax.Array]]]
    variant: Callable[[PyTree], Hashable]


@dataclasses.dataclass(frozen=True)
class Feed:
    """Where batches come from."""

    resident: PyTree  # stays on the devices for the whole run, for example all rows
    indices: Callable[[int, int], PyTree]  # of (first step, count): arrays [count, ...]
    select: Callable[[PyTree, PyTree], PyTree]  # resident, a step's indices -> batch, compiled


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, n: int, part: tuple[int, int] = (0, 0)) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, *part]))
    return generator.permutation(n).astype(np.int32)


def epoch_order(
    seed: int, *, start: int, count: int, n: int, window: int | None = None
) -> np.ndarray:
    """Returns entries ``start`` and on of an endless shuffled order of 0..n-1, epoch by epoch.

    With a ``window`` (a multiple of BLOCK), an epoch shuffles its blocks of consecutive rows, and
    then the rows of every ``window`` of them: what is read together lies together. Rows that fit
    one window come as without it.
    """
    window = window or n
    epochs, inside = np.divmod(np.arange(start, start + count, dtype=np.int64), n)
    windows, order = epochs * -(-n // window) + inside // window, np.empty(count, np.int32)
    for number in np.unique(windows):
        epoch, i = divmod(int(number), -(-n // window))
        here, begin, size = windows == number, i * window, min(window, n - i * window)
        order[here] = _permutation(seed, epoch, size, (0, i))[inside[here] - begin]
        if size < n:
            blocks = _permutation(seed, epoch, n // BLOCK, (1, 0))
            blocks = np.sort(blocks[begin // BLOCK : (begin + size) // BLOCK])
            rows = np.add.outer(blocks * BLOCK, np.arange(BLOCK)).ravel()
            rest = np.arange(n - n % BLOCK, n)  # behind the last block: stay last
            order[here] = np.concatenate([rows, rest])[order[here]]
    return order


def train(
    ensemble: Any,
    *,
    steps: int,
    seed: int,
    directory: Path,
    title: str,
    meta: dict,
    checkpoint_every: int = 500,
    records: Sequence[str] = (),
) -> list[PyTree]:
    """Returns the trained parameters of every member, as arrays on the host.

    With validation those of its best score, as {"params", "score", "step", "stale"}.

    Args:
      directory: keeps checkpoints, metrics.jsonl and the members' labels.
      title: for the progress bar and error messages.
      meta: JSON values that the result depends on; a checkpoint with others is refused.
      records: see ``MetricsWriter``.

    Raises:
      UserError: a metric or a parameter is not finite (it and the step are named, the checkpoint
        before is kept), the directory cannot be written, or the checkpoint is damaged or of other
        settings.
      KeyboardInterrupt: SIGINT or SIGTERM came; what was trained is saved.
    """
    labels, layout, root = list(ensemble.labels), ensemble.layout, jax.random.key(seed)
    checkpoints, trainable = Path(directory) / "checkpoints", ensemble.trainable(steps)
    meta = json.loads(json.dumps({"members": labels, **meta}))
    done, pending = checkpoint.latest_step(checkpoints) or 0, None
    if not done:
        state = initial(trainable, root, layout)
    elif checkpoint.load_meta(checkpoints) != meta:
        raise UserError(
            f"{checkpoints} was written with other settings or data; delete it to start again."
        )
    else:
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout),
            jax.eval_shape(trainable.init, root),
        )
        state = checkpoint.restore(checkpoints, **abstract)
    run_chunk = Chunks(trainable, ensemble.feed, root, steps=steps)
    if done < steps:
        check_space(Path(directory))
    if done < steps and logging.get_verbosity() >= logging.INFO:
        size = run_chunk.memory(state, done)
        about = "unknown memory" if size is None else f"about {size / 1e9:.3f} GB"
        say(f"{title}: {about} on each of {jax.device_count()} device(s)")
    file = Path(directory) / "metrics.jsonl"
    writer = MetricsWriter(file, start=done, records=records, labels=labels)
    bar = {"total": steps, "initial": done, "desc": title, "unit": "step"}
    with (
        progress_bar(**bar) as progress,
        interruptions() as received,
        ThreadPoolExecutor(1) as disk,
    ):
        saving, saved_at = disk.submit(int), time.monotonic()
        report = functools.partial(_report, title=title, writer=writer, progress=progress)
        while done < steps:
            count = min(MAX_CHUNK, steps - done, checkpoint_every - done % checkpoint_every)
            state, metrics = run_chunk(state, done, count)
            if pending:
                report(*pending)
            pending, done = (done, count, metrics), done + count
            late = time.monotonic() - saved_at > CHECKPOINT_SECONDS
            if done % checkpoint_every == 0 or done == steps or received or late:
                report(*pending)
                pending = None
                _check_params(state["params"], done, title)
                saving.result()
                copied = jax.tree.map(np.array, state)  # as the next chunk writes over the state
                saving = disk.submit(checkpoint.save, checkpoints, done, meta=meta, **copied)
                saved_at = time.monotonic()
            if saving.done() or done == steps or received:
                saving.result()  # raises what went wrong
            if received:
                raise KeyboardInterrupt
    writer.close()
    result = state["train"].get("best", state["params"])
    result = jax.jit(lambda tree: tree, out_shardings=shard(ensemble.mesh))(result)
    stacked = jax.tree.map(np.asarray, result)
    write_json(Path(directory) / "members.json", [{"label": label} for label in labels])
    return [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(len(labels))]


@contextlib.contextmanager
def interruptions() -> Iterator[list[int]]:
    """Puts SIGINT and SIGTERM off: yields a list to which they are added, for a better moment.

    The second one interrupts at once. Outside of the main thread, where no signal comes, it does
    nothing.
    """
    received: list[int] = []

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, note) or signal.SIG_DFL
                stack.callback(signal.signal, number, before)
        yield received


def initial(trainable: Trainable, root: jax.Array, layout: jax.sharding.Sharding) -> PyTree:
    """Returns the state before the first step, every array with this sharding.

    Weak types are removed, as steps return none: else the second chunk would be compiled again.
    """
    strong = functools.partial(jax.tree.map, lambda a: jax.lax.convert_element_type(a, a.dtype))
    return jax.jit(lambda root: strong(trainable.init(root)), out_shardings=layout)(root)


class Chunks:
    """Up to ``limit`` steps of a training in one call: one compiled program for any number.

    (state, first step, number of steps) -> (state, metrics [limit, ...]); the old state is gone.
    What the feed gives for the next call is made by a thread meanwhile; what fails there is raised
    by that call. Nothing is made for the steps from ``steps`` on.
    """

    def __init__(
        self,
        trainable: Trainable,
        feed: Feed,
        root: jax.Array,
        *,
        limit: int = MAX_CHUNK,
        steps: float = math.inf,
    ):
        self._trainable, self._feed, self._root = trainable, feed, root
        self._limit, self._steps = limit, steps
        self._thread, self._ahead = ThreadPoolExecutor(1), (None, None)
        options = {"donate_argnums": 0, "compiler_options": compiler_options()}

        @functools.partial(jax.jit, static_argnames="variant", **options)
        def run_chunk(state, resident, indices, first, count, root, variant):
            step = jax.jit(functools.partial(trainable.step, variant=variant))  # is traced once

            def one_step(state, j):
                batch = feed.select(resident, jax.tree.map(lambda a: a[j], indices))
                number = jnp.int32(first + j)
                return step(state, batch, number, jax.random.fold_in(root, number))

            def body(j, carry):
                state, new = one_step(carry[0], j)
                return state, jax.tree.map(lambda all_, m: all_.at[j].set(m), carry[1], new)

            _, shapes = jax.eval_shape(one_step, state, 0)
            empty = jax.tree.map(lambda m: jnp.zeros((limit, *m.shape), m.dtype), shapes)
            return jax.lax.fori_loop(0, count, body, (state, empty))

        self.run = run_chunk

    def __call__(self, state: PyTree, first: int, count: int) -> tuple[PyTree, dict]:
        arguments = self._arguments(state, first, count)
        if first + count < self._steps:
            self._send(first + count)
        return self.run(*arguments)

    def memory(self, state: PyTree, first: int = 0) -> int | None:
        """Returns a device's peak bytes in the first chunk; None if the compiler does not tell.

        Compiles what the first call would.
        """
        compiled = self.run.lower(*self._arguments(state, first, 1)).compile()
        sizes = compiled.memory_analysis()
        if sizes is None:
            return None
        held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        return held + sizes.temp_size_in_bytes - sizes.alias_size_in_bytes

    def _send(self, first: int) -> None:
        self._ahead = first, self._thread.submit(self._feed.indices, first, self._limit)

    def _arguments(self, state: PyTree, first: int, count: int) -> tuple:
        """The variant comes last, as reading the state waits for the steps before."""
        if self._ahead[0] != first:
            self._send(first)
        fixed = (self._feed.resident, self._ahead[1].result(), first, count, self._root)
        return state, *fixed, self._trainable.variant(state)


def _report(first: int, count: int, metrics: dict, *, title: str, writer, progress) -> None:
    values = {name: np.asarray(m)[:count] for name, m in metrics.items()}
    for name, value in values.items():
        bad = ~np.isfinite(value.reshape(count, -1)).all(axis=1)
        if bad.any():
            raise UserError(
                f"{title}: {name} is not finite at step {first + int(bad.argmax())}; "
                "lower the learning rate or look at the data."
            )
    row = {name: np.mean(value, axis=0).tolist() for name, value in values.items()}
    writer(first + count - 1, row)
    if "loss" in values:
        progress.set_postfix(loss=f"{values['loss'][-1].mean():.4g}", refresh=False)
    progress.update(count)


@jax.jit
def _finite(params: PyTree) -> PyTree:
    return jax.tree.map(lambda a: jnp.isfinite(a).all(), params)


def _check_params(params: PyTree, done: int, title: str) -> None:
    """Raises UserError if a parameter is not finite: the last step's gradient was not."""
    for path, finite in jax.tree_util.tree_leaves_with_path(_finite(params)):
        if not finite:
            raise UserError(
                f"{title}: parameter {jax.tree_util.keystr(path)} is not finite after step "
                f"{done - 1}; lower the learning rate or look at the data."
            )

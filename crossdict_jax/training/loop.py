"""The training loop. The order of one turn, where it binds:

1. restore the newest sealed checkpoint, or initialise;
2. dispatch a chunk of steps;
3. only then read the metrics of the chunk before (bounds the work in flight);
4. checkpoint between chunks, never inside one, and when somebody asks the process to stop: the
   state is copied to the host, then a thread writes and seals it, one at a time.

Initial state and data order are pure functions of seed and step: killed runs end with equal bits.
"""

import contextlib
import dataclasses
import functools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from crossdict_jax.errors import UserError
from crossdict_jax.training import checkpoint
from crossdict_jax.training.mesh import compiler_options, shapes_of, shard
from crossdict_jax.training.metrics import MetricsWriter
from crossdict_jax.training.stage import progress_bar
from crossdict_jax.workdir import check_space, say, write_json

MAX_CHUNK = 50  # steps per dispatch
CHECKPOINT_SECONDS = 600.0  # at most, besides steps: large steps are slow, and machines pre-empted
LOWER = "lower the learning rate (where something is trained already, in a new --workdir) or look "
LOWER += "at the data."
BLOCK = 64  # rows: of 1024 numbers the 128 KiB that Linux reads ahead of a memory map
PyTree = Any


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
    labels, root, checkpoints = ensemble.labels, jax.random.key(seed), directory / "checkpoints"
    meta = json.loads(json.dumps({"members": labels, **meta}))
    done, pending = checkpoint.latest_step(checkpoints) or 0, None
    if not done:
        state = initial(ensemble, root)
    elif checkpoint.load_meta(checkpoints) != meta:
        raise UserError(
            f"{checkpoints} was written with other settings or data; delete it to start again."
        )
    else:
        abstract = shapes_of(jax.eval_shape(ensemble.init, root), ensemble.layout)
        state = checkpoint.restore(checkpoints, **abstract)
    run_chunk = Chunks(ensemble, root, steps=steps)
    if done < steps:
        check_space(directory)
    if done < steps and logging.get_verbosity() >= logging.INFO:
        size = run_chunk.memory(state, done)
        about = "unknown memory" if size is None else f"about {size / 1e9:.3f} GB"
        say(f"{title}: {about} on each of {jax.device_count()} device(s)")
    writer = MetricsWriter(directory / "metrics.jsonl", start=done, records=records, labels=labels)
    with (
        progress_bar(total=steps, initial=done, desc=title, unit="step") as progress,
        interruptions() as received,
        ThreadPoolExecutor(1) as disk,
    ):
        saving, saved_at = disk.submit(int), time.monotonic()
        report = functools.partial(_report, title, writer, progress)
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
    write_json(directory / "members.json", [{"label": label} for label in labels])
    return [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(len(labels))]


@contextlib.contextmanager
def interruptions() -> Iterator[list[int]]:
    """Puts SIGINT and SIGTERM off: yields a list to which they are added, for a better moment.

    The second one interrupts at once. Other threads than the main one get no signals.
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


def initial(ensemble: Any, root: jax.Array) -> PyTree:
    """Returns an ensemble's state before the first step, on its devices.

    Weak types are removed, as steps return none: else the second chunk would be compiled again.
    """
    strong = functools.partial(jax.tree.map, lambda a: jax.lax.convert_element_type(a, a.dtype))
    return jax.jit(lambda root: strong(ensemble.init(root)), out_shardings=ensemble.layout)(root)


class Chunks:
    """Up to ``limit`` of an ensemble's ``steps`` in one call: one compiled program for any number.

    (state, first step, number of steps) -> (state, metrics [limit, ...]); the old state is gone.
    What the feed gives for the next call is made by a thread meanwhile; what fails there is raised
    by that call.
    """

    def __init__(self, ensemble: Any, root: jax.Array, *, steps: int, limit: int = MAX_CHUNK):
        self._ensemble, self._root, self._steps, self._limit = ensemble, root, steps, limit
        self._thread, self._ahead = ThreadPoolExecutor(1), (None, None)
        options = {"donate_argnums": 0, "compiler_options": compiler_options()}

        @functools.partial(jax.jit, static_argnames="variant", **options)
        def run_chunk(state, resident, indices, first, count, root, variant):
            # Jitted: is traced once.
            step = jax.jit(functools.partial(ensemble.step, variant=variant, steps=steps))

            def one_step(state, j):
                batch = ensemble.feed.select(resident, jax.tree.map(lambda a: a[j], indices))
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
        self._ahead = first, self._thread.submit(self._ensemble.feed.indices, first, self._limit)

    def _arguments(self, state: PyTree, first: int, count: int) -> tuple:
        """The variant comes last, as reading the state waits for the steps before."""
        if self._ahead[0] != first:
            self._send(first)
        resident, sent = self._ensemble.feed.resident, self._ahead[1].result()
        variant = self._ensemble.objective.variant(state["train"]["memory"])
        return state, resident, sent, first, count, self._root, variant


def _report(title: str, writer, progress, first: int, count: int, metrics: dict) -> None:
    values = {name: np.asarray(m)[:count] for name, m in metrics.items()}
    for name, value in values.items():
        bad = ~np.isfinite(value.reshape(count, -1)).all(axis=1)
        if bad.any():
            step = first + int(bad.argmax())
            raise UserError(f"{title}: {name} is not finite at step {step}; {LOWER}")
    means = {n: v[-1] if n == "validation" else v.mean(axis=0) for n, v in values.items()}
    writer(first + count - 1, {name: mean.tolist() for name, mean in means.items()})
    if "loss" in values:
        progress.set_postfix(loss=f"{values['loss'][-1].mean():.4g}", refresh=False)
    progress.update(count)


_finite = jax.jit(functools.partial(jax.tree.map, lambda a: jnp.isfinite(a).all()))


def _check_params(params: PyTree, done: int, title: str) -> None:
    """Raises UserError if a parameter is not finite: the last step's gradient was not."""
    for path, finite in jax.tree_util.tree_leaves_with_path(_finite(params)):
        if not finite:
            name = f"parameter {jax.tree_util.keystr(path)}"
            raise UserError(f"{title}: {name} is not finite after step {done - 1}; {LOWER}")

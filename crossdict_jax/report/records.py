"""Training curves for other tools: TensorBoard and Weights & Biases, each an optional writer.

The loop writes metrics.jsonl and nothing else. While a command runs, a thread reads what has been
added there and hands it on, so that no writer can slow a training, stop it, or change its bits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from crossdict_jax.errors import UserError
from crossdict_jax.workdir import Workdir, read_json, write_json

SECONDS = 2.0  # between two looks
MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Writer(Protocol):
    """Where curves go."""

    def write(self, curve: str, step: int, values: dict[str, float]) -> None:
        """Adds one point to each of the named values of a curve."""

    def close(self) -> None:
        """Hands on what is still held."""


class TensorBoard:
    """Event files below WORKDIR/records/tensorboard: a folder for every training."""

    def __init__(self, work: Workdir):
        from tensorboardX import SummaryWriter

        self._open = lambda curve: SummaryWriter(str(folder(work) / "tensorboard" / curve))
        self._writers: dict = {}

    def write(self, curve: str, step: int, values: dict[str, float]) -> None:
        writer = self._writers.get(curve) or self._writers.setdefault(curve, self._open(curve))
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class WeightsAndBiases:
    """One run of the project ``crossdict_jax``, named like the work directory."""

    def __init__(self, work: Workdir):
        import wandb

        folder(work).mkdir(parents=True, exist_ok=True)
        settings = read_json(work.root / "config.json")
        name = work.root.resolve().name
        self._run = wandb.init(
            project="crossdict_jax", name=name, config=settings, dir=str(folder(work))
        )

    def write(self, curve: str, step: int, values: dict[str, float]) -> None:
        self._run.log({f"{curve}/{name}": value for name, value in values.items()} | {"step": step})

    def close(self) -> None:
        self._run.finish()


WRITERS: dict[str, Callable[[Workdir], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def folder(work: Workdir) -> Path:
    """Returns where writers keep their files."""
    return work.root / "records"


@contextlib.contextmanager
def following(work: Workdir, names: Iterable[str]) -> Iterator[None]:
    """Hands curves on to the named writers while the body runs; to nobody without names.

    Raises:
      UserError: the package of a writer is not installed.
    """
    for name in names:
        if importlib.util.find_spec(MODULES[name]) is None:
            raise UserError(
                f"records={name} needs the package {MODULES[name]}, which is not installed; "
                f"pip install {MODULES[name]}, or leave records out."
            )
    if not names:
        yield
        return
    follower = Follower(work, [WRITERS[name](work) for name in names])
    done = threading.Event()
    thread = threading.Thread(target=_repeat, args=(follower, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        follower.look()
        follower.close()


def _repeat(follower: Follower, done: threading.Event) -> None:
    while not done.wait(SECONDS):
        follower.look()


class Follower:
    """Reads the metrics files of a work directory; each point is handed on once, over all runs."""

    def __init__(self, work: Workdir, writers: list[Writer]):
        self._work, self._writers = work, writers
        self._state = folder(work) / "handed_on.json"  # {curve: the last step}
        self._last = read_json(self._state) if self._state.exists() else {}

    def look(self) -> None:
        """Hands on every whole line that has been added since the last look."""
        before = dict(self._last)
        for path in sorted(self._work.root.rglob("metrics.jsonl")):
            curve = str(path.parent.relative_to(self._work.root))
            for row in _whole_lines(path):
                if row["step"] > self._last.get(curve, -1):
                    self._hand_on(curve, row, _labels(path.with_name("members.json")))
        if self._last != before:
            write_json(self._state, self._last)

    def _hand_on(self, curve: str, row: dict, labels: list[str]) -> None:
        values = dict(_flat(row, labels))
        for writer in self._writers:
            writer.write(curve, row["step"], values)
        self._last[curve] = row["step"]

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def _whole_lines(path: Path) -> Iterator[dict]:
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _labels(path: Path) -> list[str]:
    return [member["label"] for member in read_json(path)] if path.exists() else []


def _flat(row: dict, labels: list[str]) -> Iterator[tuple[str, float]]:
    """Yields (name, value); of an ensemble one for each member, under its label."""
    for name, value in row.items():
        if isinstance(value, (int, float)) and name != "step":
            yield name, value
        elif isinstance(value, list):
            for i, one in enumerate(value):
                if isinstance(one, (int, float)):
                    yield f"{name}/{labels[i] if i < len(labels) else i}", one

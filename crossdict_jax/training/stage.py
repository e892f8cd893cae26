"""Stages: whether one is finished, its kept parts, its time."""

import contextlib
import ctypes
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from crossdict_jax import results
from crossdict_jax.training import checkpoint
from crossdict_jax.workdir import (
    Workdir,
    check_space,
    file_digest,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)

BAR_DELAY = 3.0  # seconds of work before a progress bar is drawn


class Stage:
    """A stage that writes result files, in parts that are kept as soon as they are done.

    It is finished if its files are there, made from the same inputs; interrupted, it goes on after
    the last kept part::

        stage = Stage(work, "probe", files=("probe.jsonl",), inputs=inputs)
        if not stage.finished:
            rows = [stage.part(key, lambda: measure(key)) for key in keys]
            stage.finish({"probe.jsonl": rows}, texts=len(texts))
    """

    def __init__(
        self, work: Workdir, name: str, *, files: Iterable[str], inputs: Mapping[str, str]
    ):
        """``name`` stands in timing.json and its own two files; ``inputs`` are {input: digest}."""
        self.work, self.name, self._files, self._inputs = work, name, tuple(files), dict(inputs)
        self._stamp = work.result(f"{name}.inputs.json")
        self._kept_file = work.result(f"{name}.parts.jsonl")
        self._started = time.perf_counter()
        self._parts: dict[tuple, Any] | None = None  # {key: value}, read with the first part

    @property
    def finished(self) -> bool:
        """Whether all its files are there, made from these inputs."""
        files = [self._stamp, *map(self.work.result, self._files)]
        if all(map(Path.exists, files)) and read_json(self._stamp) == self._inputs:
            return True
        check_space(self.work.results)  # before any work
        return False

    def part(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Returns a part's JSON value: kept by an interrupted run, or ``make()``."""
        if self._parts is None:
            head, lines = {"inputs": digest(self._inputs)}, []
            if self._kept_file.exists():
                data = self._kept_file.read_bytes()
                os.truncate(self._kept_file, data.rfind(b"\n") + 1)  # a kill cut the last line off
                lines = read_jsonl(self._kept_file)
            lines = lines if lines[:1] == [head] else [head]
            write_jsonl(self._kept_file, lines)
            self._parts = {tuple(line["key"]): line["value"] for line in lines[1:]}
        if key not in self._parts:
            self._parts[key] = make()
            with self._kept_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": self._parts[key]}) + "\n")
            free_memory()
        return self._parts[key]

    def finish(self, tables: Mapping[str, list[dict]], **figures: float | int | str) -> None:
        """Writes the rows of every file, their inputs and the time."""
        self._stamp.unlink(missing_ok=True)  # which speaks of the files before
        for file, rows in tables.items():
            results.write(self.work, file, rows)
        write_json(self._stamp, self._inputs)
        self._kept_file.unlink(missing_ok=True)
        _record(self.work, self.name, self._started, figures)


@contextlib.contextmanager
def timed(work: Workdir, name: str) -> Iterator[dict[str, float | int | str]]:
    """Times a stage that writes checkpoints; figures put into the yielded dict are recorded.

    Nothing is recorded if the dict stays empty.
    """
    figures, started = {}, time.perf_counter()
    yield figures
    if figures:
        _record(work, name, started, figures)


def _record(work: Workdir, name: str, started: float, figures: dict) -> None:
    """Writes time, figures, and rows and tokens per second into timing.json."""
    wall = time.perf_counter() - started
    rates = {f"{n}_per_s": figures[n] / wall for n in ("rows", "tokens") if n in figures}
    work.record_timing(name, wall_s=wall, **rates, **figures, **device_figures())
    free_memory()


def free_memory() -> None:
    """Gives memory that is no longer used back to the system; glibc would keep most of it."""
    with contextlib.suppress(AttributeError, OSError):  # other systems
        ctypes.CDLL(None).malloc_trim(0)


def progress_bar(parts: Iterable | None = None, **bar: Any):
    """Returns a bar of tqdm over ``parts``, or one that is updated by hand.

    Drawn after a few seconds and removed at the end; only on a terminal, and not with
    ``--verbosity=-2`` or below.
    """
    from tqdm import tqdm

    quiet = logging.get_verbosity() < logging.WARNING
    shown = {"disable": True if quiet else None, "delay": BAR_DELAY, "leave": False}
    return tqdm(parts, **shown | {"mininterval": 0.5} | bar)


def device_figures() -> dict[str, str | int]:
    """Returns the kind and number of devices of this process."""
    return {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}


def digest(value: Any) -> str:
    """Returns the sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def input_digests(
    work: Workdir, *, settings: Any, store_meta: dict, folders: Iterable[Path]
) -> dict[str, str]:
    """Returns {input: digest} of settings, the activation store and checkpoint folders.

    Raises:
      UserError: a checkpoint is missing or altered.
    """
    inputs = {"config": digest(settings), "store": digest(store_meta)}
    for folder in sorted(set(folders)):
        seal = folder / f"{checkpoint.finished_step(folder)}.sha256.json"
        inputs[str(folder.relative_to(work.root))] = file_digest(seal)
    return inputs


def outdated(work: Workdir) -> Iterator[str]:
    """Yields a sentence for every stage whose results are of checkpoints that were made again."""
    for stamp in sorted(work.results.rglob("*.inputs.json")):
        stage = stamp.relative_to(work.results).as_posix().removesuffix(".inputs.json")
        for name, seal in read_json(stamp).items():
            folder = work.root / name
            step = checkpoint.latest_step(folder)
            if step is not None and file_digest(folder / f"{step}.sha256.json") != seal:
                yield f"The results of {stage} are older than {name}; run its command again."
                break

"""What stages share: is one finished, what its parts left behind, how long it took."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from crossdict_jax import results
from crossdict_jax.training import checkpoint
from crossdict_jax.workdir import Workdir, read_json, write_json, write_jsonl


class Stage:
    """A stage that writes result files, made of parts that are kept as soon as they are done.

    A stage is finished if its files are there and were made from the same inputs; a stage that was
    interrupted goes on behind the last part it kept.

    ::

        stage = Stage(work, "probe", files=("probe.jsonl",), inputs=inputs)
        if not stage.finished:
            rows = [stage.part(key, lambda: measure(key)) for key in keys]
            stage.finish({"probe.jsonl": rows}, texts=len(texts))
    """

    def __init__(
        self, work: Workdir, name: str, *, files: Iterable[str], inputs: Mapping[str, str]
    ):
        """
        Args:
          name: of the stage, in timing.json and in the names of its own two files.
          files: the result files that it writes.
          inputs: {what it depends on: digest}; see ``digest`` and ``input_digests``.
        """
        self.work, self.name, self._files, self._inputs = work, name, tuple(files), dict(inputs)
        self._stamp = work.result(f"{name}.inputs.json")
        self._kept_file = work.result(f"{name}.parts.jsonl")
        self._started = time.perf_counter()
        self._parts: dict[tuple, Any] | None = None  # read when the first part is asked for

    @property
    def finished(self) -> bool:
        """Whether all its files were made from these inputs."""
        there = all(self.work.result(file).exists() for file in self._files)
        return there and self._stamp.exists() and read_json(self._stamp) == self._inputs

    def kept(self) -> dict[tuple, Any]:
        """Returns {key: value} of the parts that an interrupted run has kept."""
        if self._parts is None:
            self._parts = self._read_parts()
        return self._parts

    def keep(self, key: tuple, value: Any) -> Any:
        """Keeps a part's JSON value under a key of texts and numbers, and returns the value."""
        self.kept()[key] = value
        with self._kept_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
        return value

    def part(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Returns a part's JSON value: as it was kept, or as ``make`` gives it now."""
        return self.kept()[key] if key in self.kept() else self.keep(key, make())

    def finish(self, tables: Mapping[str, list[dict]], **figures: float | int | str) -> None:
        """Writes the rows of every file, and says what they were made from and how long it took.

        Of ``rows`` and ``tokens`` among the figures, the number per second is recorded too.
        """
        for file, rows in tables.items():
            results.write(self.work, file, rows)
        write_json(self._stamp, self._inputs)
        self._kept_file.unlink(missing_ok=True)
        _record(self.work, self.name, self._started, figures)

    def _read_parts(self) -> dict[tuple, Any]:
        """The parts of an earlier run with these inputs; its last line may be cut off."""
        head = {"inputs": digest(self._inputs)}
        whole: list[dict] = []
        if self._kept_file.exists():
            whole = [json.loads(t) for t in self._kept_file.read_text("utf-8").split("\n")[:-1]]
        if whole[:1] != [head]:
            whole = [head]
        write_jsonl(self._kept_file, whole)
        return {tuple(line["key"]): line["value"] for line in whole[1:]}


@contextlib.contextmanager
def timed(work: Workdir, name: str) -> Iterator[dict[str, float | int | str]]:
    """Times a stage that writes checkpoints; figures put into the yielded dict are recorded too.

    Of ``rows`` and ``tokens`` among them, the number per second is as well. Nothing is recorded if
    the dict stays empty: then there was nothing to do.
    """
    figures: dict[str, float | int | str] = {}
    started = time.perf_counter()
    yield figures
    if figures:
        _record(work, name, started, figures)


def _record(work: Workdir, name: str, started: float, figures: dict) -> None:
    """Writes a stage's time and figures into timing.json, and rows and tokens per second."""
    wall = time.perf_counter() - started
    rates = {f"{n}_per_s": figures[n] / wall for n in ("rows", "tokens") if n in figures}
    work.record_timing(name, wall_s=wall, **rates, **figures, **device_figures())


def progress_bar(parts: Iterable | None = None, **bar: Any):
    """Returns a progress bar (of tqdm) over ``parts``, or one that is updated by hand.

    Drawn on a terminal alone, and not with ``--verbosity=-2`` or below.
    """
    from tqdm import tqdm

    quiet = logging.get_verbosity() < logging.WARNING
    return tqdm(parts, disable=True if quiet else None, **bar)


def device_figures() -> dict[str, str | int]:
    """Returns what kind of device and how many of them this process uses."""
    return {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}


def digest(value: Any) -> str:
    """Returns the sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def input_digests(
    work: Workdir, *, settings: Any, store_meta: dict, folders: Iterable[Path]
) -> dict[str, str]:
    """Returns {input: digest} of settings, the activation store and checkpoint folders.

    Raises:
      UserError: a checkpoint is missing or altered: its own checksum is verified.
    """
    found = {"config": digest(settings), "store": digest(store_meta)}
    for folder in sorted(set(folders)):
        step = checkpoint.finished_step(folder)
        checkpoint.verify(folder, step)
        seal = (folder / f"{step}.sha256.json").read_text()
        found[str(folder.relative_to(work.root))] = hashlib.sha256(seal.encode()).hexdigest()
    return found

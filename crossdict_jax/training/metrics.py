"""Training metrics: a line of metrics.jsonl per chunk of steps, and the same for other tools."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from crossdict_jax.errors import UserError

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # by the value of ``records``


class MetricsWriter:
    """Appends rows to a jsonl file and hands them to TensorBoard or Weights & Biases.

    ``writer(step, row)`` adds one row. Of an ensemble a metric is a list; other tools get a curve
    for each member, ``METRIC/LABEL``. Event files lie in ``tensorboard/`` beside the jsonl file; a
    Weights & Biases run of the project ``crossdict_jax`` is named by the file's folder.
    """

    def __init__(
        self, path: Path, *, start: int, records: Sequence[str] = (), labels: Sequence[str] = ()
    ):
        """Opens the file; rows of step ``start`` and later, and a torn last line, are cut off.

        Args:
          path: of the jsonl file.
          start: the first step that will be written.
          records: "tensorboard", "wandb", both or none.
          labels: of the members of an ensemble, else their numbers.

        Raises:
          UserError: the package of a tool is not installed.
        """
        for name in records:
            if importlib.util.find_spec(PACKAGES[name]) is None:
                raise UserError(
                    f"records={name} needs the package {PACKAGES[name]}, which is not installed; "
                    f"pip install {PACKAGES[name]}, or leave records out."
                )
        self._path, self._labels = Path(path), list(labels)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step(line) < start]
        self._path.write_text("".join(line + "\n" for line in kept))
        self._events = self._run = None
        if "tensorboard" in records:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self._path.parent / "tensorboard"))
        if "wandb" in records:
            import wandb

            folder = self._path.parent
            self._run = wandb.init(project="crossdict_jax", name=str(folder), dir=str(folder))

    def __call__(self, step: int, row: dict[str, float | list[float]]) -> None:
        """Adds the metrics of a step; they reach the other tools at once."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | row) + "\n")
        curves = dict(self._curves(row))
        if self._events:
            for name, value in curves.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        if self._run:
            self._run.log(curves | {"step": step})

    def close(self) -> None:
        """Ends what was opened for other tools."""
        if self._events:
            self._events.close()
        if self._run:
            self._run.finish()

    def _curves(self, row: dict) -> Iterator[tuple[str, float]]:
        for name, value in row.items():
            if not isinstance(value, list):
                yield name, value
                continue
            for i, member in enumerate(value):
                if isinstance(member, (int, float)):
                    yield f"{name}/{self._labels[i] if i < len(self._labels) else i}", member


def _step(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line that a kill cut short

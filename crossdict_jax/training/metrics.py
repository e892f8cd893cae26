"""Training metrics: a line of metrics.jsonl per chunk of steps, and TensorBoard or wandb."""

import contextlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from crossdict_jax.errors import UserError
from crossdict_jax.workdir import write_text

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # by the value of ``records``


class MetricsWriter:
    """Appends rows to a jsonl file and hands them to TensorBoard or Weights & Biases.

    A list has a value per member; other tools get a curve for each, ``METRIC/LABEL``. Event files
    lie in ``tensorboard/`` beside the jsonl file; the run of wandb is named by the file's folder.
    """

    def __init__(
        self, path: Path, *, start: int, records: Sequence[str] = (), labels: Sequence[str] = ()
    ):
        """Opens the jsonl file; rows of step ``start`` and later and a torn last line are cut off.

        Args:
          records: "tensorboard", "wandb", both or none; they need ``labels`` of all members.

        Raises:
          UserError: the package of a tool is not installed.
        """
        for name in records:
            if importlib.util.find_spec(PACKAGES[name]) is None:
                raise UserError(
                    f"records={name} needs the package {PACKAGES[name]}, which is not installed; "
                    f"pip install {PACKAGES[name]}, or leave records out."
                )
        self._path, self._labels, folder = path, labels, path.parent
        folder.mkdir(parents=True, exist_ok=True)
        kept = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            # A kill may have cut a line short.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                kept += [line + "\n"] if json.loads(line)["step"] < start else []
        write_text(path, "".join(kept))  # whole or not at all: a kill loses no row
        self._events = self._run = None
        if "tensorboard" in records:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"))
        if "wandb" in records:
            import wandb

            self._run = wandb.init(project="crossdict_jax", name=str(folder), dir=str(folder))

    def __call__(self, step: int, row: dict[str, float | list[float]]) -> None:
        """Adds the metrics of a step; they reach the other tools at once."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | row) + "\n")
        curves = {name: values for name, values in row.items() if not isinstance(values, list)}
        for name in row.keys() - curves.keys():
            members = zip(self._labels, row[name])
            curves |= {f"{name}/{m}": v for m, v in members if not isinstance(v, list)}
        if self._events:
            for name, value in curves.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        if self._run:
            self._run.log(curves | {"step": step})

    def close(self) -> None:
        """Closes the other tools."""
        if self._events:
            self._events.close()
        if self._run:
            self._run.finish()

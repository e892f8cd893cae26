"""Training metrics: a line of metrics.jsonl per chunk of steps, and TensorBoard or wandb."""

import contextlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from crossdict_jax.errors import UserError

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # by the value of ``records``


class MetricsWriter:
    """Appends rows to a jsonl file and hands them to TensorBoard or Weights & Biases.

    A list has a value per member; other tools get a curve for each, ``METRIC/LABEL``. Event files
    lie in ``tensorboard/`` beside the jsonl file; the Weights & Biases run, in the project
    ``crossdict_jax``, is named by the file's folder.
    """

    def __init__(
        self, path: Path, *, start: int, records: Sequence[str] = (), labels: Sequence[str] = ()
    ):
        """Opens the jsonl file; rows of step ``start`` and later and a torn last line are cut off.

        Args:
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
        self._path, self._labels, folder = Path(path), list(labels), Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        lines, kept = self._path.read_text().splitlines() if self._path.exists() else [], []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError):  # a line that a kill cut short
                kept += [line + "\n"] if json.loads(line)["step"] < start else []
        self._path.write_text("".join(kept))
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
        if not self._events and not self._run:
            return
        curves = {name: values for name, values in row.items() if not isinstance(values, list)}
        for name in row.keys() - curves.keys():
            labels = [*self._labels, *range(len(self._labels), len(row[name]))]
            members = zip(labels, row[name])
            curves |= {f"{name}/{i}": v for i, v in members if not isinstance(v, list)}
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

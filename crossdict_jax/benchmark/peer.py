"""Another library as a contender: a long-lived process of its own Python."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from crossdict_jax.benchmark import workloads
from crossdict_jax.benchmark.harness import OURS, Bench, Spent
from crossdict_jax.errors import UserError
from crossdict_jax.training.loop import epoch_order

FOLDER = Path(__file__).with_name("peers")
BASELINE = "baseline"  # another checkout of this project, in this Python
VARIABLES = {  # library: the environment variable with its Python, or the checkout
    "sae-lens": "CROSSDICT_SAELENS_PYTHON",
    "sparsify": "CROSSDICT_SPARSIFY_PYTHON",
    "dictionary_learning": "CROSSDICT_DICTIONARY_LEARNING_PYTHON",
    "torch": "CROSSDICT_TORCH_PYTHON",
    "torch, cut short": "CROSSDICT_TORCH_PYTHON",
    BASELINE: "CROSSDICT_BASELINE",
}


class Peer(contextlib.AbstractContextManager):
    """A file of ``peers`` in its own process.

    Raises:
      UserError: the interpreter cannot be run, or the library fails (its last line is given).
    """

    def __init__(self, library: str, file: str | Path):
        value = os.environ.get(VARIABLES[library], "")
        self._library, self._asked = library, f"{VARIABLES[library]}={value}"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (__exit__ closes it)
        python, path = (sys.executable, value) if library == BASELINE else (value, "")
        try:
            self._process = subprocess.Popen(
                [python, str(FOLDER / "serve.py"), str(FOLDER / file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=os.environ | {"PYTHONPATH": path},
            )
        except OSError as error:
            self._errors.close()
            raise UserError(f"{self._asked} cannot be run ({error.strerror}).") from error

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def make(self, **settings) -> dict:
        """Sets the peer up anew; returns what it says of itself, such as its version."""
        return self._ask({"make": settings})

    def run(self, count: int) -> Spent:
        """Lets the peer work ``count`` times; returns what that took."""
        return Spent(**self._ask({"run": count}))

    def _ask(self, request: dict) -> dict:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            last = ["no message", *self._errors.read().strip().splitlines()][-1]
            raise UserError(f"{self._asked}: {self._library} failed ({last}).")
        return json.loads(answer)


def save_rows(folder: Path, rows: np.ndarray, *, steps: int, batch_size: int) -> None:
    """Saves rows [n, d_model] and their order in so many steps of ours, for peers that train."""
    folder.mkdir(parents=True, exist_ok=True)
    order = epoch_order(0, start=0, count=steps * batch_size, n=len(rows))
    np.save(folder / "rows.npy", rows.astype(np.float32))
    np.save(folder / "order.npy", order.reshape(steps, -1))


@contextlib.contextmanager
def peers(files: dict[str, str]) -> Iterator[dict[str, Peer]]:
    """Starts a peer for every library of ``files`` whose variable is set, and the baseline.

    Says which are left out; all end with the context.
    """
    with contextlib.ExitStack() as stack:
        running = {}
        for library, file in (files | {BASELINE: "checkout.py"}).items():
            if os.environ.get(VARIABLES[library]):
                running[library] = stack.enter_context(Peer(library, file))
            else:
                print(f"{library} left out: {VARIABLES[library]} is not set.")
        yield running


def contest(
    bench: Bench,
    case: str,
    workload: str,
    ours: dict,
    running: dict[str, Peer],
    theirs: dict[str, dict],
    amount: float,
    unit: str = "rows",
    *,
    count: int = 1,
) -> list[dict]:
    """Returns the rows of a workload of ours beside the peers that can do the same.

    ``ours`` are the settings of a name in ``workloads``, also used for the baseline; peers without
    settings in ``theirs`` are left out.
    """
    contenders = {OURS: getattr(workloads, workload)(bench.folder, **ours).run}
    about, settings = {}, {BASELINE: {"workload": workload} | ours} | theirs
    for library in filter(settings.get, running):
        about[library] = running[library].make(folder=str(bench.folder), **settings[library])
        contenders[library] = running[library].run
    return bench.compare(case, contenders, amount, unit, count=count, about=about)

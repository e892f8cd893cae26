"""Another library as a contender: a long-lived process of its own Python, told what to do."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from crossdict_jax.benchmark.harness import Spent
from crossdict_jax.errors import UserError

FOLDER = Path(__file__).with_name("peers")
PYTHONS = {  # library: the environment variable that names an interpreter which has it
    "sae-lens": "CROSSDICT_SAELENS_PYTHON",
    "sparsify": "CROSSDICT_SPARSIFY_PYTHON",
    "dictionary_learning": "CROSSDICT_DICTIONARY_LEARNING_PYTHON",
    "torch": "CROSSDICT_TORCH_PYTHON",
}


class Peer:
    """A file of ``peers`` in a process of its own; a context manager.

    Raises:
      UserError: the interpreter cannot be run, or the library fails (its last line is given).
    """

    def __init__(self, library: str, file: str):
        self.library, self._variable = library, PYTHONS[library]
        self._python = os.environ.get(self._variable, "")
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (__exit__ closes it)
        environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
        try:
            self._process = subprocess.Popen(
                [self._python, str(FOLDER / "serve.py"), str(FOLDER / file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=environment,
            )
        except OSError as error:
            self._errors.close()
            raise UserError(
                f"{self._variable}={self._python} cannot be run ({error.strerror})."
            ) from error

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def make(self, **settings) -> dict[str, Any]:
        """Sets the peer up anew; returns what it says of itself, its version among it."""
        return self._ask({"make": settings})

    def run(self, count: int) -> Spent:
        """Lets the peer do so many of what it does; returns what that took."""
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
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{self._variable}={self._python}: {self.library} failed ({last}).")
        return json.loads(answer)


def absent(library: str) -> str | None:
    """Returns a line that says why a peer is left out; None if an interpreter is named for it."""
    variable = PYTHONS[library]
    if os.environ.get(variable):
        return None
    return f"{library} left out: {variable} is not set; name a python that has it."

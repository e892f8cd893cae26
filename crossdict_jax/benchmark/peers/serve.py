"""Runs a file of this folder under a peer's own Python, and times it when asked.

PYTHON serve.py FILE

One JSON object a line each way. ``{"make": settings}`` calls the file's ``make(**settings)``, which
returns (run, answer). ``{"run": n}`` calls ``run(n)``; the answer is
``{"seconds": s, "cpu_seconds": s}``.
"""

import itertools
import json
import os
import runpy
import sys
import time
from pathlib import Path


def main(file: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries must not print between the answers
    make, run = runpy.run_path(file)["make"], None
    for line in sys.stdin:
        request = json.loads(line)
        if "make" in request:
            run = None  # frees the last one's memory first
            run, answer = make(**request["make"])
        else:
            started, cpu_started = time.perf_counter(), time.process_time()
            run(request["run"])
            seconds = time.perf_counter() - started
            answer = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu_started}
        print(json.dumps(answer), file=answers)


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def training_rows(folder: str):
    """Returns rows.npy on the device, and its batches in the order of order.npy, for ever."""
    import numpy as np
    import torch

    rows = torch.from_numpy(np.load(Path(folder) / "rows.npy")).to(device())
    order = torch.from_numpy(np.load(Path(folder) / "order.npy")).long().to(device())
    return rows, (rows[index] for index in itertools.cycle(order))


def repeated(step):
    """Returns run(count): takes so many steps, and waits for them."""
    import torch

    def run(count: int) -> None:
        for _ in range(count):
            step()
        if device() == "cuda":
            torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    main(sys.argv[1])

"""Runs a file of this folder under a peer's own Python, and times it when asked.

PYTHON serve.py FILE

One JSON object a line each way. ``{"make": settings}`` calls the file's ``make(**settings)``, which
returns (run, what to say of itself); the answer is the latter. ``{"run": n}`` calls ``run(n)``; the
answer is ``{"seconds": s, "cpu_seconds": s}``.
"""

import json
import os
import runpy
import sys
import time


def main(file: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    make, run = runpy.run_path(file)["make"], None
    for line in sys.stdin:
        request = json.loads(line)
        if "make" in request:
            run = None  # the memory of the one before is free first
            run, answer = make(**request["make"])
        else:
            started, cpu_started = time.perf_counter(), time.process_time()
            run(request["run"])
            seconds = time.perf_counter() - started
            answer = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu_started}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(sys.argv[1])

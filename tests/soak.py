"""Hours of training, checkpoints and evaluation in one process: memory and files must stay flat.

    python tests/soak.py [--minutes=60]

Dictionaries and maps of a small run are trained with a checkpoint every 10 steps and evaluated,
with the same settings over and over. Exit code 1: something grew from the middle to the end by
more than a tenth, or more than two checkpoints of one training lay there at a time.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import fault_table  # noqa: F401  first: it says where the package is, and that JAX takes the CPU
import tiny_run

from crossdict_jax.training import checkpoint
from launch import command, evaluate, extract_activations, train_hypernetworks, train_saes

WORDS = ("minutes", "cycles", "checkpoints", "rss_mb", "open_files", "threads", "files", "kept")
GROWTH = {"rss_mb": 1.1, "open_files": 1.1, "threads": 1.1, "files": 1.1}


def measured(work: Path, began: float, cycles: int, saves: list[int]) -> dict[str, float]:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    numbers = ((time.monotonic() - began) / 60, cycles, len(saves), resident / 1e6)
    numbers += (len(os.listdir("/proc/self/fd")), threading.active_count())
    return dict(zip(WORDS, (*numbers, sum(p.is_file() for p in work.rglob("*")), max(saves))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    minutes = parser.parse_args().minutes
    save, saves = checkpoint.save, [0]  # of each: how many its training kept

    def counted(directory, step=0, **trees):
        save(directory, step, **trees)
        saves.append(len(list(directory.glob("*.sha256.json"))))
        assert saves[-1] == len([p for p in directory.glob("*") if p.name.isdigit()])

    checkpoint.save = counted
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        flags = [*tiny_run.small_flags(folder / "text"), f"--workdir={folder / 'run'}"]
        flags += ["--config.checkpoint_every=10", "--config.sae.steps=200", "--verbosity=-2"]

        def cycle(config, work):
            for name in ("dictionaries", "maps", "controls", "results"):
                if (work.root / name).exists() and cycles:
                    shutil.rmtree(work.root / name)
            for stage in (extract_activations, train_saes, train_hypernetworks, evaluate):
                stage.main(config, work)

        rows, began, cycles = [], time.monotonic(), 0
        print(*(f"{word:>11}" for word in WORDS), flush=True)
        while not rows or rows[-1]["minutes"] < minutes:
            if command.execute(cycle, ["soak", *flags]):
                return 2
            cycles += 1
            rows.append(measured(folder / "run", began, cycles, saves))
            print(*(f"{rows[-1][word]:11.0f}" for word in WORDS), flush=True)
    half, tenth = rows[len(rows) // 2 :], max(1, len(rows) // 10)
    grown = {
        word: statistics.mean(r[word] for r in half[-tenth:])
        / statistics.mean(r[word] for r in half[:tenth])
        for word in GROWTH
    }
    print("from the middle to the end:", {w: f"x {g:.3f}" for w, g in grown.items()})
    return any(grown[w] > limit for w, limit in GROWTH.items()) or max(saves) > 1


if __name__ == "__main__":
    sys.exit(main())

"""A whole run of the large preset: the exact architectures with random weights, every stage."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from crossdict_jax import models
from crossdict_jax.benchmark.harness import OURS, Bench
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import read_json

ROOT, PRESET = Path(__file__).parents[3], "configs/pythia410m_gpt2medium.py"
MODELS = {  # tokenizer: whose shape
    "docs-neox": "EleutherAI/pythia-410m",
    "docs-gpt2": "openai-community/gpt2-medium",
}
SIZES = {  # on two CPU cores it would take hours
    "gpu": {
        "layers": "5,6,7",
        "text.source": "docstrings",
        "text.documents": 2000,
        "text.max_bytes": 900,  # about 256 tokens of the embedded tokenizers
        "sae.width": 4096,
        "sae.steps": 2500,
        "map.steps": 1000,
    }
}


def benchmark(bench: Bench) -> Iterator[dict]:
    """Yields a row for the whole command, started cold and run once, and one per stage.

    Raises:
      UserError: the run failed; its last line is given.
    """
    work, folders = bench.folder / "run", []
    for tokenizer, name in MODELS.items():
        lm = models.init(models.known_config(name), seed=bench.seed)
        folders.append(str(bench.folder / lm.config.model_type))
        models.save(lm, folders[-1], dtype="bfloat16", tokenizer=models.load_tokenizer(tokenizer))
    settings = {"models": ",".join(folders)} | SIZES[bench.suite]
    command = [sys.executable, "-m", "launch.experiment", f"--config={PRESET}"]
    command += [f"--workdir={work}", *(f"--config.{name}={v}" for name, v in settings.items())]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = ["no message", *done.stderr.strip().splitlines()][-1]
        raise UserError(f"The whole run failed ({last}).")
    seconds = {"all stages": time.perf_counter() - started}
    timing = read_json(work / "results" / "timing.json")
    seconds |= {name: stage["wall_s"] for name, stage in timing.items() if "wall_s" in stage}
    for case, value in seconds.items():
        yield {"benchmark": bench.name, "contender": OURS, "case": case, "seconds": value}

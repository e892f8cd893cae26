"""A whole run of the large preset: the exact architectures with random weights, every stage."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossdict_jax import models
from crossdict_jax.benchmark.harness import OURS, Bench
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import read_json

ROOT, PRESET = Path(__file__).parents[3], "configs/pythia410m_gpt2medium.py"
# Tokenizer and config.json of Pythia-410m and GPT-2 Medium.
MODELS = {
    "docs-neox": {
        "model_type": "gpt_neox",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 2048,
        "vocab_size": 50304,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
    "docs-gpt2": {
        "model_type": "gpt2",
        "n_embd": 1024,
        "n_layer": 24,
        "n_head": 16,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
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


def benchmark(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yields a row for the whole command, started cold and run once, and one per stage.

    Raises:
      UserError: the run failed; its last line is given.
    """
    work, folders = bench.folder / "run", []
    for tokenizer, shape in MODELS.items():
        folders.append(str(bench.folder / shape["model_type"]))
        lm = models.init(shape, seed=bench.seed)
        models.save(lm, folders[-1], dtype="bfloat16", tokenizer=models.load_tokenizer(tokenizer))
    settings = {"models": ",".join(folders)} | SIZES[bench.suite]
    command = [sys.executable, "-m", "launch.experiment", f"--config={PRESET}"]
    command += [f"--workdir={work}", *(f"--config.{name}={v}" for name, v in settings.items())]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"The whole run failed ({last}).")
    seconds = {"all stages": time.perf_counter() - started}
    timing = read_json(work / "results" / "timing.json")
    seconds |= {name: stage["wall_s"] for name, stage in timing.items() if "wall_s" in stage}
    for case, value in seconds.items():
        yield {"benchmark": bench.name, "contender": OURS, "case": case, "seconds": value}

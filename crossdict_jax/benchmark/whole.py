"""A whole run of the large preset: the exact architectures with random weights, every stage."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossdict_jax import models
from crossdict_jax.benchmark.startup import ROOT
from crossdict_jax.benchmark_config import BenchmarkConfig, WholeBenchmark
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import read_json

PRESET = "configs/pythia410m_gpt2medium.py"


def benchmark(config: BenchmarkConfig, folder: Path, ceilings: dict) -> Iterator[dict[str, Any]]:
    """Yields a row for the whole command, started cold, and one per stage; it is run once.

    Raises:
      UserError: the run failed; its last line is given.
    """
    own = config.whole
    models_ = [_write_model(folder, name, shape, config.seed) for name, shape in shapes(own)]
    started = time.perf_counter()
    _run(folder, models_, own)
    seconds = time.perf_counter() - started
    yield {"case": "all stages", "seconds": seconds} | _ROW
    stages = read_json(folder / "run" / "results" / "timing.json")
    for stage, figures in stages.items():
        if "wall_s" in figures:
            yield {"case": stage, "seconds": figures["wall_s"]} | _ROW


_ROW = {"benchmark": "whole", "contender": "ours"}


def shapes(own: WholeBenchmark) -> list[tuple[str, dict[str, Any]]]:
    """Returns (tokenizer, config.json) of Pythia-410m and GPT-2 Medium, in the sizes asked for."""
    pythia = {
        "model_type": "gpt_neox",
        "hidden_size": own.d_model,
        "num_hidden_layers": own.n_layers,
        "num_attention_heads": own.n_heads,
        "intermediate_size": 4 * own.d_model,
        "max_position_embeddings": 2048,
        "vocab_size": 50304,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    }
    gpt2 = {
        "model_type": "gpt2",
        "n_embd": own.d_model,
        "n_layer": own.n_layers,
        "n_head": own.n_heads,
        "n_positions": 1024,
        "vocab_size": 50257,
    }
    return [("docs-neox", pythia), ("docs-gpt2", gpt2)]


def _write_model(folder: Path, tokenizer: str, shape: dict, seed: int) -> str:
    """Writes a random model with the tokenizer of an embedded one; returns its folder."""
    place = folder / shape["model_type"]
    lm = models.init(shape, seed=seed)
    models.save(lm, place, dtype="bfloat16", tokenizer=models.load_tokenizer(tokenizer))
    return str(place)


def _run(folder: Path, models_: list[str], own: WholeBenchmark) -> None:
    settings = {
        "models": ",".join(models_),
        "layers": ",".join(map(str, own.layers)),
        "text.source": "docstrings",
        "text.documents": own.documents,
        "text.max_bytes": own.bytes,
        "extract.matmul_dtype": own.matmul_dtype,
        "sae.matmul_dtype": own.matmul_dtype,
        "sae.width": own.width,
        "sae.steps": own.sae_steps,
        "map.steps": own.map_steps,
    }
    asked = [f"--config.{name}={value}" for name, value in settings.items()]
    command = ["-m", "launch.experiment", f"--config={PRESET}", f"--workdir={folder / 'run'}"]
    done = subprocess.run(
        [sys.executable, *command, *asked], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"The whole run failed ({last}).")

"""Reading layers of a language model: ours beside torch, the whole model and cut short."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax import models
from crossdict_jax.activations.extract import Reader
from crossdict_jax.benchmark.harness import OURS, Need, alternate, compared, timed
from crossdict_jax.benchmark.peer import Peer, absent
from crossdict_jax.benchmark_config import BenchmarkConfig, ExtractionBenchmark
from crossdict_jax.config import ExtractConfig
from crossdict_jax.models import LanguageModel, Site

WHOLE, CUT = "transformers, whole model", "transformers, cut short"


def benchmark(config: BenchmarkConfig, folder: Path, ceilings: dict) -> Iterator[dict[str, Any]]:
    """Yields rows: windows of equal length, then of mixed lengths, in the order of a text.

    All read the same tokens with the same random weights and keep the same layers. Ours sorts
    windows by length; every batch is as long as its longest. Rows of torch also hold
    ``difference``: that of its activations from ours, as a share of their norm.
    """
    own = config.extraction
    lm = models.init(architecture(own), seed=config.seed)
    extract = ExtractConfig(batch_size=own.batch_size, matmul_dtype=own.matmul_dtype)
    reader = Reader(extract, lm, [Site(layer) for layer in own.layers], None)
    cases = {"equal lengths": _equal, "mixed lengths": _mixed}
    windows = {case: draw(own, config.seed) for case, draw in cases.items()}
    with ExitStack() as stack:
        peers = _peers(stack, lm, folder)
        for case, some in windows.items():
            about = _set_up(peers, own, some, _captured(reader, some), folder)
            contenders = {OURS: lambda some=some: timed(lambda: _read(reader, some))}
            contenders |= {name: lambda p=p: p.run(1) for name, p in peers.items()}
            spent = alternate(contenders, repeats=config.repeats)
            need = _need(own, lm, some)
            yield from compared("extraction", case, spent, need, ceilings=ceilings, about=about)


def architecture(config: ExtractionBenchmark) -> dict[str, Any]:
    """Returns what config.json would hold of a GPT-2 of these sizes."""
    return {
        "model_type": "gpt2",
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_positions": max(1024, config.window_tokens),
        "vocab_size": config.vocab_size,
    }


def _equal(config: ExtractionBenchmark, seed: int) -> list[np.ndarray]:
    return _windows(config, [config.window_tokens] * config.windows, seed)


def _mixed(config: ExtractionBenchmark, seed: int) -> list[np.ndarray]:
    """Lengths from a quarter of the longest to all of it, evenly, in random order."""
    longest = config.window_tokens
    lengths = np.linspace(max(1, longest // 4), longest, config.windows).astype(int)
    return _windows(config, np.random.default_rng(seed).permutation(lengths), seed)


def _windows(config: ExtractionBenchmark, lengths, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, n).astype(np.int32) for n in lengths]


def _read(reader: Reader, windows: list[np.ndarray]) -> None:
    for _ in reader.read(windows):
        pass


def _captured(reader: Reader, windows: list[np.ndarray]) -> np.ndarray:
    """Our activations of the first window, float32 [layers, tokens, d_model]."""
    captured = dict(reader.read(windows))[0]
    return np.stack([x.astype(np.float32) for x in captured])


def _peers(stack: ExitStack, lm: LanguageModel, folder: Path) -> dict[str, Peer]:
    if line := absent("torch"):
        print(line)
        return {}
    models.save(lm, folder / "model")
    return {
        name: stack.enter_context(Peer("torch", "transformers_forward.py")) for name in (WHOLE, CUT)
    }


def _set_up(peers, own: ExtractionBenchmark, windows, captured: np.ndarray, folder: Path) -> dict:
    """Hands the windows to the peers; returns what they say, and how far they are from ours."""
    tokens = np.concatenate(windows)
    np.savez(folder / "windows.npz", tokens=tokens, lengths=[len(w) for w in windows])
    about = {}
    for name, peer in peers.items():
        shape = {"layers": list(own.layers), "batch_size": own.batch_size, "cut": name == CUT}
        about[name] = peer.make(folder=str(folder), **shape)
        theirs = np.load(folder / "captured.npy", allow_pickle=False)
        difference = np.linalg.norm(theirs - captured) / np.linalg.norm(captured)
        about[name] |= {"difference": float(difference)}
    return about


def _need(own: ExtractionBenchmark, lm: LanguageModel, windows: list[np.ndarray]) -> Need:
    """The blocks below the highest layer: their matrices, and what attention sees of the past."""
    d, depth, config = own.d_model, max(own.layers), lm.config
    lengths = np.asarray([len(w) for w in windows], float)
    matrices = 4 * d * d + 2 * d * config.d_mlp
    flops = depth * (2 * matrices * lengths.sum() + 4 * d * (lengths * (lengths + 1) / 2).sum())
    batches = -(-len(windows) // own.batch_size)
    traffic = 4 * depth * matrices * batches + 2 * len(own.layers) * d * lengths.sum()
    return Need(lengths.sum(), "tokens", flops, traffic, own.matmul_dtype)

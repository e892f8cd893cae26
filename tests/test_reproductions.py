"""Presets of published numbers: complete, and run through at a small size on stand-in models."""

import importlib
import itertools
import re
import sys
from pathlib import Path

import jax
import pytest
from test_launch import launch
from tiny_run import SHAPES, flags, make_models, make_texts, write_rows

from crossdict_jax import dictionaries
from crossdict_jax.dictionaries.base import build

STAND_INS = {  # preset: the folders that stand in for its models, and its settings at this size
    "chen2025_gpt2": (("gpt2", "gpt2-medium"), {"layer_pairs": "0:1"}),
    "chen2025_pythia": (("pythia-70m-deduped", "pythia-160m-deduped"), {"layer_pairs": "0:1"}),
    "lan2024_published": (("pythia-70m", "pythia-160m"), {"layer_pairs": "1:1"}),
    "lan2024_corrected": (("pythia-70m", "pythia-160m"), {"layer_pairs": "1:1"}),
    "mccann2026": (("seed1", "seed2", "seed3"), {"layers": "1"}),
}
SMALL = """text.documents=120 text.max_bytes=400 text.window_tokens=40 sae.width=64 sae.k=6
    sae.steps=60 sae.batch_size=64 evaluation.bootstrap=20 evaluation.minimum_firings=5
    intervention.documents=6 intervention.features=0"""


@pytest.mark.parametrize("preset", STAND_INS)
def test_a_preset_expects_what_its_run_writes(preset):
    """Every number is of a file and a column that stages write, and says where it was published."""
    module = importlib.import_module(f"configs.{preset}")
    expectations = module.get_expectations()
    assert expectations
    for one in expectations:
        assert one.low < one.high and re.search(r"arXiv \d{4}\.\d{5}", one.source)
        published = [float(v) for v in re.findall(r"[\d.]+", one.published)]
        assert one.low <= min(published) and max(published) <= one.high


@pytest.mark.soak
@pytest.mark.parametrize("preset", STAND_INS)
def test_a_preset_runs_through(preset, tmp_path):
    """The commands of its docstring, on stand-ins; random models may miss the numbers."""
    names, changes = STAND_INS[preset]
    # Copies of one model, where decoders of confirmed matches are compared: there must be some.
    folders = stand_ins(names, tmp_path, copies=preset.startswith("lan"))
    changes = changes | {"models": ",".join(folders), "text.source": tmp_path / "text.jsonl"}
    if preset.startswith("lan"):
        changes["sae.sources"] = ",".join(f"{folder}/sae/{{layer}}" for folder in folders)
    module = importlib.import_module(f"configs.{preset}")
    commands = re.findall(r"python -m launch\.(\w+)", module.__doc__)
    arguments = {name: [f"--workdir={tmp_path}/run"] for name in commands}
    arguments["experiment"] += [f"--config=configs/{preset}.py", *flags(SMALL, **changes)]
    arguments[commands[-1]] += [f"--expect=configs/{preset}.py"]
    for name in commands:
        done = launch([sys.executable, "-m", f"launch.{name}"], *arguments[name])
        assert done.returncode in (0, 1), done.stderr
    table = done.stdout[done.stdout.index("Expected") :]
    assert len(re.findall(r"\b(met|MISSED)\b", table)) == len(module.get_expectations())


def stand_ins(names, root: Path, *, copies: bool) -> tuple[str, ...]:
    """Random models of one vocabulary, with dictionaries of somebody else; their folders."""
    texts = make_texts(120)
    write_rows(root / "text.jsonl", [{"text": text} for text in texts])
    folders = make_models(root, texts, dict.fromkeys(names, SHAPES["a"]), copies=copies)
    for number, (name, layer) in enumerate(itertools.product(names, range(2))):
        seed = layer if copies else number
        d = build("topk", d_model=16, width=64, k=6, key=jax.random.key(seed))
        place = {"hook_name": f"blocks.{layer}.hook_resid_pre", "model_name": name}
        dictionaries.save_saelens(d, root / name / "sae" / str(layer), **place)
    return folders

"""Soak: dictionaries of a killed run equal those of a run that nothing disturbed, bit for bit.

CROSSDICT_SOAK_KILLS=20 python -m pytest tests/test_soak.py -m soak -n 0 -s
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from planted_store import assert_close

from crossdict_jax import dictionaries, modules
from crossdict_jax.activations.extract import extract
from crossdict_jax.config import SAEConfig, architectures, to_dict
from crossdict_jax.workdir import open_workdir

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("CROSSDICT_SOAK_KILLS", "20"))  # moments, over all architectures
pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a store, and the settings of two models and two seeds."""
    root = tmp_path_factory.mktemp("soak")
    config = tiny_run.make_config(root)
    config.sae = SAEConfig(width=48, k=4, steps=800, batch_size=256, seeds=2)
    config.checkpoint_every = 50
    extract(config, open_workdir(root / "store", to_dict(config)))
    return root


@pytest.fixture(scope="module")
def undisturbed(root) -> tuple[dict, float]:
    """Parameters of a run that nothing disturbed, and the seconds it took."""
    started = time.monotonic()
    return trained(shutil.copytree(root / "store", root / "whole")), time.monotonic() - started


def start(work: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "tests/soak_run.py", f"--workdir={work}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def trained(work: Path) -> dict[str, np.ndarray]:
    """Trains to the end; returns the parameters of all dictionaries."""
    process = start(work)
    _, complaint = process.communicate()
    assert process.returncode == 0, complaint[-2000:]
    return parameters(work)


def parameters(work: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for architecture in architectures():
        folders = sorted((work / architecture / "dictionaries").glob("*/*/seed-*"))
        assert len(folders) == 4, architecture
        for folder in folders:
            params = modules.split(dictionaries.load(folder))[1]
            for name, value in jax.tree.map(np.asarray, params).items():
                arrays[f"{folder.relative_to(work)} {name}"] = value
    return arrays


def progress(work: Path) -> str:
    """What was finished when a run was killed, and the newest of its sealed checkpoints."""
    done = len(list(work.glob("*/dictionaries/*/*/seed-*/*.sha256.json")))
    sealed = list(work.glob("*/dictionaries/training/*/checkpoints/*.sha256.json"))
    newest = max(sealed, key=lambda p: p.stat().st_mtime).stem if sealed else "nothing"
    return f"{done} dictionaries finished, {newest} sealed"


def test_killed_at_random_moments(root, undisturbed):
    expected, seconds = undisturbed
    draw, work, kills = random.Random(0), shutil.copytree(root / "store", root / "killed"), 0
    while True:
        process = start(work)
        patience = draw.uniform(0.1, 0.6) * seconds if kills < KILLS else None
        try:
            _, complaint = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            sent = signal.SIGKILL if kills % 2 else signal.SIGTERM
            process.send_signal(sent)
            process.communicate()
            kills += 1
            print(f"{sent.name} after {patience:.1f} s: {progress(work)}")
            continue
        assert process.returncode == 0, complaint[-2000:]
        assert_close(parameters(work), expected)
        if kills >= KILLS:
            break
        for architecture in architectures():  # done already: begin again, kill again
            shutil.rmtree(work / architecture)

"""Soak: dictionaries of killed runs equal those of a run that nothing disturbed, bit for bit.

CROSSDICT_SOAK_KILLS=20 python -m pytest tests/test_soak.py -m soak -n 0
"""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from crossdict_jax import dictionaries, modules
from crossdict_jax.activations.extract import extract
from crossdict_jax.config import SAEConfig, to_dict
from crossdict_jax.settings import architectures
from crossdict_jax.workdir import Workdir, open_workdir, read_json, write_json

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("CROSSDICT_SOAK_KILLS", "20"))  # moments per architecture
pytestmark = pytest.mark.soak


@pytest.fixture(scope="module", params=architectures())
def prepared(request, tmp_path_factory):
    """A small store with its settings, and what an undisturbed run makes of it."""
    root = tmp_path_factory.mktemp(request.param)
    config = tiny_run.make_config(root)
    config.sae = SAEConfig(
        architecture=request.param,
        width=48,
        k=4,
        steps=3000,
        batch_size=256,
        seeds=2,
        checkpoint_every=100,
    )
    extract(config, open_workdir(root / "store", to_dict(config)))
    return root, trained(copied(root, "whole"))


def copied(root: Path, name: str) -> Path:
    shutil.copytree(root / "store", root / name)
    return root / name


def start(work: Path, *, devices: int = 1) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "launch.train_saes", f"--workdir={work}"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def trained(work: Path, **how) -> Path:
    process = start(work, **how)
    _, complaint = process.communicate()
    assert process.returncode == 0, complaint[-2000:]
    return work


def parameters(work: Path) -> dict[str, np.ndarray]:
    """Of all dictionaries of a run, by their place."""
    found = {}
    folders = (p for p in Workdir(work).dictionaries.glob("*/*/seed-*") if p.is_dir())
    for folder in sorted(folders):
        params = modules.split(dictionaries.load(folder))[1]
        for name, value in jax.tree.map(np.asarray, params).items():
            found[f"{folder.relative_to(work)} {name}"] = value
    assert found
    return found


def test_killed_at_random_moments(prepared):
    root, whole = prepared
    draw, killed, kills = random.Random(0), copied(root, "killed"), 0
    while True:
        process = start(killed)
        try:
            patience = draw.uniform(4, 12) if kills < KILLS else None
            _, complaint = process.communicate(timeout=patience)
            assert process.returncode == 0, complaint[-2000:]
            if kills >= KILLS:
                break
            shutil.rmtree(killed / "dictionaries")  # done already: begin again, kill again
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL if kills % 2 else signal.SIGTERM)
            process.communicate()
            kills += 1
    assert kills >= KILLS
    there = parameters(killed)
    for place, value in parameters(whole).items():
        np.testing.assert_array_equal(there[place], value, err_msg=place)


def test_another_mesh_gives_the_same_to_tolerance(prepared):
    """A few steps: rounding differs between meshes, and training amplifies it without bound."""
    root, _ = prepared
    few = {"sae": {"steps": 20}}
    one, eight = (shortened(copied(root, name), few) for name in ("one", "eight"))
    there = parameters(trained(eight, devices=8))
    for place, value in parameters(trained(one)).items():
        np.testing.assert_allclose(there[place], value, atol=1e-5, err_msg=place)


def shortened(work: Path, settings: dict) -> Path:
    config = read_json(work / "config.json")
    config["sae"] |= settings["sae"]
    write_json(work / "config.json", config)
    return work

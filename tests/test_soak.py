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
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from crossdict_jax import dictionaries, modules
from crossdict_jax.activations.extract import extract
from crossdict_jax.config import SAEConfig, architectures, to_dict
from crossdict_jax.workdir import open_workdir, read_json, write_json

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("CROSSDICT_SOAK_KILLS", "20"))  # moments, over all architectures
pytestmark = pytest.mark.soak


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed.

    Attributes:
      root: where its store lies, for others to copy.
      seconds: from its start to its end.
    """

    root: Path
    work: Path
    seconds: float


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    """Two models, two seeds, every architecture."""
    root = tmp_path_factory.mktemp("soak")
    config = tiny_run.make_config(root)
    config.sae = SAEConfig(width=48, k=4, steps=800, batch_size=256, seeds=2, checkpoint_every=50)
    extract(config, open_workdir(root / "store", to_dict(config)))
    started = time.monotonic()
    work = trained(copied(root, "whole"))
    return Whole(root, work, time.monotonic() - started)


def copied(root: Path, name: str) -> Path:
    shutil.copytree(root / "store", root / name)
    return root / name


def changed(work: Path, *, records: tuple[str, ...] = (), **sae) -> Path:
    config = read_json(work / "config.json")
    write_json(work / "config.json", config | {"records": records, "sae": config["sae"] | sae})
    return work


def start(work: Path, *, devices: int = 1, flags: str = "") -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices} {flags}"
    return subprocess.Popen(
        [sys.executable, "tests/soak_run.py", f"--workdir={work}"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
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
    for architecture in architectures():
        folders = sorted((work / architecture / "dictionaries").glob("*/*/seed-*"))
        assert len(folders) == 4, architecture
        for folder in folders:
            params = modules.split(dictionaries.load(folder))[1]
            for name, value in jax.tree.map(np.asarray, params).items():
                found[f"{folder.relative_to(work)} {name}"] = value
    return found


def assert_same_bits(work: Path, whole: Whole) -> None:
    there = parameters(work)
    for place, value in parameters(whole.work).items():
        np.testing.assert_array_equal(there[place], value, err_msg=place)


def progress(work: Path) -> str:
    """What was finished when a run was killed, and the newest of its sealed checkpoints."""
    done = len(list(work.glob("*/dictionaries/*/*/seed-*/*.sha256.json")))
    sealed = work.glob("*/dictionaries/training/*/checkpoints/*.sha256.json")
    newest = max(sealed, key=lambda p: p.stat().st_mtime, default=None)
    where = (*newest.relative_to(work).parts[:1], newest.stem) if newest else ("nothing sealed",)
    return f"{done} dictionaries finished, {' '.join(where)}"


def test_killed_at_random_moments(whole):
    draw, killed, kills = random.Random(0), copied(whole.root, "killed"), 0
    while True:
        process = start(killed)
        try:
            patience = draw.uniform(0.1, 0.6) * whole.seconds if kills < KILLS else None
            _, complaint = process.communicate(timeout=patience)
            assert process.returncode == 0, complaint[-2000:]
            assert_same_bits(killed, whole)
            if kills >= KILLS:
                break
            for architecture in architectures():  # done already: begin again, kill again
                shutil.rmtree(killed / architecture)
        except subprocess.TimeoutExpired:
            sent = signal.SIGKILL if kills % 2 else signal.SIGTERM
            process.send_signal(sent)
            process.communicate()
            kills += 1
            print(f"{sent.name} after {patience:.1f} s: {progress(killed)}")
    assert kills >= KILLS


def test_watching_a_run_changes_no_bit(whole):
    """Curves go to a writer, and dictionaries are evaluated, between one training and the next."""
    pytest.importorskip("tensorboardX")
    watched = trained(changed(copied(whole.root, "watched"), records=("tensorboard",)))
    assert list((watched / "records").rglob("events.out.tfevents.*"))
    assert_same_bits(watched, whole)


def test_another_mesh_gives_the_same_bits(whole):
    """To the end, where parts of a batch lie whole on a device, and the compiler fuses no products.

    With FMA instructions it keeps one product of a sum exact, and which one it chooses depends on
    what else is in the program.
    """
    works = [changed(copied(whole.root, f"parts-{n}"), accumulate=8) for n in (1, 8)]
    for work, devices in zip(works, (1, 8)):
        trained(work, devices=devices, flags="--xla_cpu_max_isa=AVX")
    one, eight = map(parameters, works)
    for place, value in one.items():
        np.testing.assert_array_equal(eight[place], value, err_msg=place)


def test_another_mesh_begins_the_same_to_tolerance(whole):
    """At the usual settings, where rounding differs between meshes, and training amplifies it.

    After 20 steps it has decided a gate otherwise. To the end: the test above.
    """
    one, eight = (changed(copied(whole.root, name), steps=10) for name in ("one", "eight"))
    there = parameters(trained(eight, devices=8))
    for place, value in parameters(trained(one)).items():
        np.testing.assert_allclose(there[place], value, atol=1e-5, err_msg=place)

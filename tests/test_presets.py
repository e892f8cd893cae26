"""The large preset: every program of its run is traced at full size."""

import jax
import numpy as np
import pytest
from tiny_run import slow

from configs import pythia410m_gpt2medium
from crossdict_jax import models, modules
from crossdict_jax.compile import programs
from crossdict_jax.compile.machines import machine
from crossdict_jax.training.mesh import planned

CONFIG = pythia410m_gpt2medium.get_config()


@pytest.mark.parametrize(("name", "millions"), zip(CONFIG.models, (405.3, 354.8)))
def test_parameters_are_as_many_as_published(name, millions):
    _, params = modules.abstract(lambda: models.init(models.known_config(name)))
    count = sum(np.prod(p.shape) for p in jax.tree.leaves(params)) / 1e6
    assert count == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("extraction", "read pythia-410m-deduped"),
        ("dictionaries", "6 topk of width 4096, d 1024"),
        ("trained_maps", "12 maps mlp"),
        slow("crosscoders", "6 crosscoders of width 4096, d 1024+1024"),
        slow("scoring", "rank in a pool"),
        slow("stitching", "edited gpt2-medium"),
    ],
)
def test_programs_are_traced_at_full_size(stage, name):
    target = machine("cpu-1")
    with planned(target.devices(), int(target.device.memory)):
        traced = list(getattr(programs, stage)(programs.make_plan(CONFIG)))
    assert name in {program.name for program in traced}
    assert all(program.runs > 0 and program.lowered.out_info for program in traced)

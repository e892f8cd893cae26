"""Programs compiled for machines that are not here: costs read off them, what fits, and limits."""

import dataclasses
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
from tiny_run import refused

from configs import pythia410m_gpt2medium
from crossdict_jax.compile import estimate, hlo, programs, report
from crossdict_jax.compile.machines import machine
from crossdict_jax.config import Config, MapConfig, SAEConfig, TextConfig
from crossdict_jax.training.mesh import planned
from launch import command

CPU = machine("cpu-1")
TINY = Config(
    models=("docs-gpt2", "docs-gpt2"),  # of one shape: fewer programs
    layers=(2,),
    text=TextConfig(documents=20, max_bytes=400, window_tokens=32),
    sae=SAEConfig(width=64, k=4, steps=100, batch_size=64),
    map=MapConfig(kinds=("ridge_codes", "mlp", "token_mlp", "crosscoder"), hidden=16, steps=50),
    controls=("ceiling",),
    machine="cpu-1",
)


def test_names_of_machines():
    named = {"v5e-8": (8, "2x4"), "v6e-256": (256, "16x16"), "h100-1": (1, "1x1x1")}
    named |= {"v5p-64": (32, "2x4x4"), "h100-32": (32, "1x4x8")}  # Google's number counts cores
    machines = {name: machine(name) for name in named}
    assert {name: (m.count, m.shape) for name, m in machines.items()} == named
    assert all(1e9 < m.device.memory < 1e12 for m in machines.values())
    assert machine("h100-8").network > 5 * machine("h100-32").network  # between hosts
    for name in ("", "v5e", "v5e-3", "v5e-08", "a100-8", "h100-eight"):
        refused(rf"--machine={name} is none of v5e-1\|4\|8", machine, name)


def test_a_compiler_that_does_not_start_or_is_not_installed_is_named(monkeypatch):
    def broken(**options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", broken)
    refused(r"h100-1: its compiler does not start \(topology", machine("h100-1").devices)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    refused(r'pip install "jax\[cuda13', machine("h100-1").devices)
    refused(r"jax\[tpu\]", machine("v5e-8").devices)


def cost_of(function, *shapes, trips: int = 1):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.cost(jax.jit(function).lower(*arrays).compile().as_text(), CPU, trips)


def test_a_product_takes_its_operations_and_its_bytes_and_stacked_ones_those_of_all_members():
    cost = cost_of(jnp.matmul, (64, 128), (128, 32))
    assert cost["flops"] == pytest.approx(2 * 64 * 128 * 32)
    assert cost["bytes"] == 4 * (64 * 128 + 128 * 32 + 64 * 32)
    assert cost["compute"] == cost["flops"] / CPU.device.float32
    cost = cost_of(jax.vmap(jnp.matmul), (3, 64, 128), (3, 128, 32))
    assert cost["flops"] == pytest.approx(3 * 2 * 64 * 128 * 32)


def test_a_loop_counts_as_often_as_it_turns():
    def seven(x, w):
        return jax.lax.fori_loop(0, 7, lambda _, x: x @ w, x)

    def many(x, w, n):
        return jax.lax.fori_loop(0, n[0].astype(int), lambda _, x: x @ w, x)

    product = 2 * 64 * 64 * 64
    assert cost_of(seven, (64, 64), (64, 64))["flops"] == pytest.approx(7 * product)
    unknown = cost_of(many, (64, 64), (64, 64), (1,), trips=50)
    assert unknown["flops"] == pytest.approx(50 * product) and unknown["waits"] == 50


def test_of_branches_the_shortest_counts_and_of_a_large_array_the_rows_that_are_taken():
    def seldom(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: (x @ w) @ w, lambda: x)

    assert cost_of(seldom, (64, 64), (64, 64)).get("flops", 0) == 0
    assert cost_of(lambda x, i: x[i.astype(int)] * 2, (100_000, 64), (8,))["bytes"] < 100 * 8 * 64


def test_kernels_read_a_row_for_every_entry():
    text = """
ENTRY %main (starts: s32[9], w: f32[100], table: bf16[50,64], index: s32[100]) -> f32[8,64] {
  %starts = s32[9]{0} parameter(0)
  %w = f32[100]{0} parameter(1)
  %table = bf16[50,64]{1,0} parameter(2)
  %index = s32[100]{0} parameter(3)
  ROOT %sums = f32[8,64]{1,0} custom-call(%starts, %w, %table, %index), TARGET
}
"""
    text = text.replace("TARGET", 'custom_call_target="__gpu$xla.gpu.triton"')
    assert hlo.cost(text, CPU, 1)["bytes"] == 4 * (9 + 100 + 100 + 8 * 64) + 2 * 100 * 64


def test_collectives_and_exchanges_with_the_host_are_found():
    text = """
ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %sum = f32[8,4]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  %all = (f32[8,4]{1,0}, f32[64,4]{1,0}) all-gather-start(%sum), dimensions={0}
  %done = f32[64,4]{1,0} all-gather-done(%all)
  %out = token[] outfeed(%sum, %x), outfeed_config=""
  ROOT %back = f32[8,4]{1,0} custom-call(%sum), custom_call_target="xla_python_cpu_callback"
}
"""
    cost = hlo.cost(text, CPU, 1)
    assert cost["sent all-reduce"] == 128 and cost["sent all-gather"] == (128 + 1024) / 2
    assert cost["host outfeed"] == cost["host custom-call"] == 1


@pytest.fixture(scope="module")
def tiny():
    return report.compile_run(TINY)


@pytest.fixture(scope="module")
def step(tiny):
    return next(e for e in tiny if "topk" in e.program.name)


def test_every_stage_of_a_run_is_compiled(tiny):
    stages = "extract_activations train_saes train_hypernetworks evaluate intervene"
    assert list(dict.fromkeys(e.program.stage for e in tiny)) == stages.split()
    names = " ".join(e.program.name for e in tiny)
    words = ("read docs-gpt2", "topk of width 64", "crosscoders", "maps mlp", "maps token_mlp")
    words += ("predict by mlp", "predict by ridge_codes", "clean", "edited")
    assert all(word in names for word in words)
    assert all(e.memory > 0 and e.total_ms > 0 and e.run_s > 0 for e in tiny)
    assert not any(e.host or e.sent for e in tiny)


def test_every_product_of_a_run_states_its_precision(tiny):
    """Accelerators would round the inputs of the others: numbers in a notebook would differ."""
    lines = "\n".join(e.program.lowered.as_text() for e in tiny).splitlines()
    products = [line for line in lines if "stablehlo.dot" in line]
    assert len(products) > 50
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_a_dictionarys_step_takes_its_five_products(step):
    members, parameters = 2, 2 * 96 * 64 + 64 + 96
    assert step.flops == pytest.approx(members * 10 * 64 * 96 * 64, rel=0.1)
    assert step.memory > members * 3 * 4 * parameters  # with two moments of each


def test_what_does_not_fit_is_refused_with_what_mends_it(step):
    device = dataclasses.replace(CPU.device, memory=0.75 * step.memory)
    small = dataclasses.replace(CPU, device=device)
    refused(r"needed on each device.*try sae\.width=32", estimate.refuse_too_large, [step], small)
    assert "DOES NOT FIT" in [cell.text for cell in report.costs([step], small).rows[0]]


def test_the_largest_settings_grow_with_what_is_free(step):
    found = estimate.largest(step, CPU)
    assert found["sae.width"] > 64 and math.log2(found["sae.width"]).is_integer()
    tight = dataclasses.replace(step, memory=2 * CPU.device.memory, held=CPU.device.memory / 2)
    assert estimate.largest(tight, CPU)["sae.batch_size"] < 64


def test_the_command_makes_no_work_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    argv = ["compile", "--machine=cpu-1", "--models=docs-gpt2,docs-neox"]
    assert command.execute(lambda *given: seen.append(given), argv, writes=False) == 0
    assert seen[0][0].machine == "cpu-1" and seen[0][1] is None
    expect = f"--expect={command.ROOT}/configs/chen2025_gpt2.py"
    assert command.execute(print, [*argv, expect], writes=False) == 2
    assert not list(tmp_path.iterdir())


def test_a_model_whose_shape_is_not_known_is_refused(tmp_path):
    config = dataclasses.replace(TINY, models=("docs-gpt2", "some/model"))
    refused(r"shape of 'some/model' is not known.*config\.json", programs.make_plan, config)


SENT = {"all-reduce": 202}
# For v5e-8: GB on a device, estimated ms, those without the network, {collective: MB}.
RECORDED = {
    ("extraction", "read gpt2-medium"): (4.60, 14.3, 14.3, {}),
    ("dictionaries", "6 topk of width 4096, d 1024"): (2.75, 3.93, 1.91, {"all-reduce": 101}),
    ("dictionaries", "2 topk of width 131072, d 1024"): (5.27, 39.1, 17.6, {"all-reduce": 1075}),
    ("crosscoders", "6 crosscoders of width 4096, d 1024+1024"): (5.42, 6.68, 2.65, SENT),
    ("trained_maps", "12 maps mlp"): (3.75, 1.92, 0.776, {"all-reduce": 54.1, "all-gather": 6.3}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name"), RECORDED)
def test_programs_for_a_tpu_take_what_they_took(stage, name):
    pytest.importorskip("libtpu", minversion="0.0.52")  # older ones make other programs
    config, target = pythia410m_gpt2medium.get_config(), machine("v5e-8")
    if "131072" in name:
        config.sae.width, config.layers = 131_072, (6,)
    with planned(target.devices(), int(target.device.memory)):
        some = getattr(programs, stage)(programs.make_plan(config))
        found = estimate.estimate(next(p for p in some if p.name == name), target)
    memory, ms, alone, sent = RECORDED[stage, name]
    assert not found.host
    assert found.sent.keys() <= sent.keys()  # no other collective
    assert all(size <= 1.1e6 * sent[kind] for kind, size in found.sent.items())
    assert found.memory <= 1.1e9 * memory and found.total_ms <= 1.2 * ms
    # Alone: beside the network's time a sort of all rows could hide.
    assert found.total_ms - found.ms["network"] == pytest.approx(alone, rel=0.2)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="no jax[cuda13]")
def test_a_wide_dictionary_takes_kernels_on_a_gpu():
    config, target = pythia410m_gpt2medium.get_config(), machine("h100-1")
    wide = {"width": 65_536, "k": 32, "batch_size": 4096}
    config.layers, config.sae = (6,), dataclasses.replace(config.sae, **wide)
    with planned(target.devices(), int(target.device.memory)):
        (program,) = programs.dictionaries(programs.make_plan(config))
        found = estimate.estimate(program, target)
    assert program.lowered.as_text().count("xla.gpu.triton") == 5
    assert not found.host and not found.sent
    assert found.memory <= 1.1 * 9.61e9 and found.total_ms == pytest.approx(11.0, rel=0.2)

"""No option does nothing: every setting is turned, and something that a run makes must change.

A new setting needs one line here. Where a small function of the library can show what it does, add
it to ``TURNED``: a value other than the default, and the probe of ``option_probes`` (from a config
to what is compared) that must see it. Where only a whole stage can, and a test of that stage turns
it, add its name to ``ELSEWHERE`` beside that test.
"""

import dataclasses
import hashlib
import re
from functools import cache
from pathlib import Path

import jax
import numpy as np
import option_probes as probes
import pytest
from option_probes import (
    batches,
    closed_forms,
    corpus,
    crosscoders,
    dictionaries,
    ladder,
    mask,
    network,
    plan,
    preferences,
    pretraining,
    probed,
    reader,
    resampled,
    sites,
    tiny,
    trained_map,
)

from crossdict_jax.config import (
    BenchmarkConfig,
    Config,
    ConvertConfig,
    PretrainConfig,
    VerifyConfig,
    settings,
)

HERE = Path(__file__).parent
KINDS = (Config, PretrainConfig, ConvertConfig, VerifyConfig, BenchmarkConfig)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with probes.at(tmp_path_factory.mktemp("options")):
        yield
    seen.cache_clear()


# ---------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class Turn:
    """One setting turned: a value other than the one before, where it shows, and what else holds.

    ``given``: settings that both configs share, such as the architecture that reads this one.
    """

    other: object
    probe: object
    given: tuple = ()


def given(**values):
    return tuple((name.replace("__", "."), value) for name, value in values.items())


TEXT = {
    "text.source": Turn("OTHER", corpus),
    "text.column": Turn("other", corpus),
    "text.documents": Turn(30, corpus),
    "text.max_bytes": Turn(9, corpus),
    "text.validation_fraction": Turn(0.45, corpus),
    "text.test_fraction": Turn(0.5, corpus),
}
JUMP, NESTED = given(sae__architecture="jumprelu"), given(sae__architecture="matryoshka")
L1 = given(crosscoder__variant="l1")
TURNED = {
    Config: TEXT
    | {
        "models": Turn("SWAPPED", plan),
        "layers": Turn((0,), sites),
        "layer_pairs": Turn("0:1", sites),
        "site": Turn("mlp_out", sites),
        "seed": Turn(1, dictionaries),
        "controls": Turn(("ceiling",), ladder),
        "control_kinds": Turn(("ridge",), ladder),
        "control_pairs": Turn(1, ladder, given(layers=(1, 2))),
        "text.window_tokens": Turn(12, plan),
        "extract.batch_size": Turn(16, reader),
        "extract.norm_mask": Turn(30.0, mask, given(extract__nonfinite="skip")),
        "extract.nonfinite": Turn("skip", mask),
        "extract.matmul_dtype": Turn("bfloat16", reader),
        "sae.architecture": Turn("relu", dictionaries),
        "sae.output_site": Turn("mlp_out", sites),
        "sae.width": Turn(12, dictionaries),
        "sae.k": Turn(3, dictionaries),
        "sae.l1_coefficient": Turn(2.0, dictionaries, given(sae__architecture="relu")),
        "sae.learning_rate": Turn(1e-3, dictionaries),
        "sae.steps": Turn(50, dictionaries),
        "sae.batch_size": Turn(8, dictionaries),
        "sae.accumulate": Turn(2, dictionaries),
        "sae.seeds": Turn(2, dictionaries),
        "sae.warmup_fraction": Turn(0.5, dictionaries),
        "sae.l1_warmup_fraction": Turn(0.5, dictionaries, given(sae__architecture="gated")),
        "sae.gradient_clip": Turn(99.0, dictionaries, given(sae__architecture="relu")),
        "sae.auxk_coefficient": Turn(1.0, dictionaries),
        "sae.k_aux": Turn(1, dictionaries),
        "sae.dead_after_rows": Turn(77, dictionaries),
        "sae.bandwidth": Turn(1.0, dictionaries, JUMP),
        "sae.l0_target": Turn(2.0, dictionaries, JUMP),
        "sae.nested_fractions": Turn((0.4,), dictionaries, NESTED),
        "sae.nested_balance": Turn(0.5, dictionaries, NESTED),
        "sae.matmul_dtype": Turn("bfloat16", dictionaries),
        "sae.checkpoint_every": Turn(3, dictionaries),
        "map.kinds": Turn(("mean", "ridge"), ladder),
        "map.ridge_penalties": Turn((50.0,), closed_forms),
        "map.ranks": Turn((1,), closed_forms),
        "map.token_pseudocounts": Turn((500.0,), closed_forms),
        "map.hidden": Turn(6, trained_map),
        "map.head": Turn("relu", trained_map),
        "map.dropout": Turn(0.3, trained_map),
        "map.steps": Turn(30, trained_map),
        "map.batch_size": Turn(32, trained_map),
        "map.learning_rate": Turn(1e-3, trained_map),
        "map.validate_every": Turn(7, trained_map),
        "map.patience": Turn(2, trained_map),
        "map.correlation_features": Turn(2, trained_map),
        "map.weight_decay": Turn(0.1, trained_map),
        "map.gradient_clip": Turn(0.5, trained_map),
        "map.checkpoint_every": Turn(3, trained_map),
        "map.loss_weights.mse": Turn(2.0, trained_map),
        "map.loss_weights.cosine": Turn(2.0, trained_map),
        "map.loss_weights.correlation": Turn(2.0, trained_map),
        "map.loss_weights.sparsity": Turn(2.0, trained_map),
        "map.hypernetwork.rank": Turn(2, network),
        "map.hypernetwork.profile_rank": Turn(2, network),
        "map.hypernetwork.hidden": Turn(6, network),
        "map.hypernetwork.dropout": Turn(0.3, network),
        "map.hypernetwork.feature_dropout": Turn(0.3, network),
        "map.hypernetwork.steps": Turn(30, network),
        "map.hypernetwork.batch_size": Turn(32, network),
        "map.hypernetwork.learning_rate": Turn(1e-3, network),
        "map.hypernetwork.weight_decay": Turn(0.1, network),
        "map.hypernetwork.checkpoint_every": Turn(3, network),
        "crosscoder.variant": Turn("l1", crosscoders),
        "crosscoder.width": Turn(12, crosscoders),
        "crosscoder.k": Turn(3, crosscoders),
        "crosscoder.l1_coefficient": Turn(2.0, crosscoders, L1),
        "crosscoder.shared_fraction": Turn(0.5, crosscoders),
        "crosscoder.drop_probability": Turn(0.2, crosscoders),
        "crosscoder.learning_rate": Turn(1e-3, crosscoders),
        "crosscoder.steps": Turn(50, crosscoders),
        "crosscoder.batch_size": Turn(8, crosscoders),
        "crosscoder.warmup_fraction": Turn(0.5, crosscoders),
        "crosscoder.l1_warmup_fraction": Turn(0.5, crosscoders, L1),
        "crosscoder.auxk_coefficient": Turn(1.0, crosscoders),
        "crosscoder.k_aux": Turn(1, crosscoders),
        "crosscoder.dead_after_rows": Turn(77, crosscoders),
        "crosscoder.matmul_dtype": Turn("bfloat16", crosscoders),
        "crosscoder.checkpoint_every": Turn(3, crosscoders),
        "evaluation.bootstrap": Turn(11, resampled),
        "evaluation.batch_size": Turn(16, batches),
        "contrast.maps": Turn(("ridge",), preferences),
        "probe.maps": Turn(("ridge",), probed),
    },
    PretrainConfig: TEXT
    | {
        "model_type": Turn("gpt_neox", pretraining),
        "d_model": Turn(32, pretraining),
        "n_layers": Turn(2, pretraining),
        "n_heads": Turn(1, pretraining),
        "context": Turn(16, pretraining),
        "vocab_size": Turn(310, pretraining),
        "steps": Turn(50, pretraining),
        "batch_size": Turn(4, pretraining),
        "learning_rate": Turn(1e-3, pretraining),
        "matmul_dtype": Turn("bfloat16", pretraining),
        "checkpoint_every": Turn(3, pretraining),
        "seed": Turn(1, pretraining),
    },
    ConvertConfig: {},
    VerifyConfig: {},
    BenchmarkConfig: {},
}

# Settings that a test of their stage turns: {test: names with blanks between}.
ELSEWHERE = {
    Config: {
        "test_records.test_every_point_is_handed_on_once_over_all_runs": "records",
        "test_controls.test_controls_that_cannot_be_are_refused": "checkpoint_every",
        "test_convert.test_a_source_takes_the_place_of_training": "sae.sources",
        "test_convert.test_codes_before_the_selection_on_demand": "sae.source_codes",
        "test_crosscoder_map.test_a_model_beside_itself_shares_its_latents": ""
        "crosscoder.self_nulls",
        "test_evaluation.test_the_pool_is_fixed_and_as_large_as_asked": "evaluation.pool",
        "test_shared_features.test_every_setting_matters": "evaluation.matching "
        "evaluation.minimum_firings evaluation.fdr",
        "test_shared_features.test_every_layer_is_compared_with_every_other": ""
        "evaluation.similarity_rows",
        "test_efficiency.test_every_map_is_scored_at_every_number_of_rows": "efficiency.rows",
        "test_pareto.test_every_setting_has_a_row": "pareto.architectures pareto.k "
        "pareto.penalties",
        "test_causal_features.test_documents_bound_the_text": "intervention.documents",
        "test_run.test_the_size_of_a_batch_changes_nothing": "intervention.batch_size",
        "test_causal_features.test_settings_change_the_rows": "intervention.features "
        "intervention.alphas intervention.norm",
        "test_causal_transfer.test_settings_reach_the_models": "intervention.contexts "
        "intervention.span intervention.positions",
        "test_causal_features.test_named_features_are_the_first_models": "intervention.feature_ids",
        "test_causal_features.test_matched_features_come_from_the_file": "intervention.choose",
        "test_causal_features.test_all_layer_pairs_or_the_middle_one": "intervention.layers",
        "test_causal_features.test_maps_are_those_that_read_more_than_tokens": "intervention.maps",
        "test_contrast.test_settings_change_the_rows": "contrast.features contrast.span "
        "contrast.pairs",
        "test_contrast.test_a_folder_is_all_its_files": "contrast.source",
        "test_probe.test_settings_change_the_rows": "probe.pooling probe.examples",
        "test_probe.test_bad_texts_are_named": "probe.text probe.label probe.source",
        "test_contrast.test_controls_have_the_norm_of_the_cut": "contrast.controls",
        "test_steering.test_mistakes_are_told_in_one_line": "steer.source steer.target "
        "steer.layer_pair",
        "test_steering.test_every_edit_has_its_texts_and_rates": "steer.feature steer.map "
        "steer.alphas steer.samples steer.tokens",
        "test_steering.test_the_mapped_direction_is_put_in_at_the_asked_norm": "steer.norm",
        "test_steering.test_a_search_lists_features_and_takes_the_first": "steer.search",
        "test_steering.test_prompts_are_one_text_or_the_lines_of_a_file": "steer.prompts",
        "test_generation.test_draws_follow_the_probabilities_and_the_nucleus": ""
        "steer.temperature steer.top_p",
    },
    PretrainConfig: {
        "test_pretraining.test_a_trained_model_is_a_folder_that_beats_the_unigram": "save_dtype",
        "test_config.test_a_setting_that_would_do_nothing_is_refused": "text.window_tokens",
    },
    ConvertConfig: {
        "test_convert.test_there_and_back_is_the_same_dictionary": "source format hook_name "
        "model_name",
        "test_convert.test_an_upload_holds_the_folder_and_nothing_else": "push",
    },
    VerifyConfig: {
        "test_gates.test_all_gates_passing_is_success": "gates",
        "test_gates.test_g10_misses_chance_and_seeds_that_change_nothing": "seed",
    },
    BenchmarkConfig: {
        "test_benchmark.test_the_command_refuses_what_it_does_not_know": "benchmarks suite",
        "test_benchmark.test_contenders_take_turns_and_the_first_run_does_not_count": "repeats",
        "test_benchmark.test_steps_are_measured_without_any_peer": "seed",
    },
}

SMALL = {  # what probes start from, so that they are quick
    "sae.width": 8,
    "sae.k": 2,
    "sae.steps": 40,
    "sae.batch_size": 16,
    "map.hidden": 8,
    "map.steps": 20,
    "map.batch_size": 16,
    "map.hypernetwork.hidden": 8,
    "map.hypernetwork.rank": 3,
    "map.hypernetwork.profile_rank": 3,
    "map.hypernetwork.steps": 20,
    "map.hypernetwork.batch_size": 16,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "context": 8,
    "vocab_size": 300,
    "steps": 40,
    "batch_size": 2,
    "layers": (1,),
    "text.documents": 40,
    "text.validation_fraction": 0.3,
    "text.test_fraction": 0.3,
}


def config_of(kind, *changes):
    """The small config of a kind with settings changed."""
    config, names = kind(), settings.settings(kind)
    text = {"text.source": str(probes.place() / "lines.jsonl")}
    if kind is Config:
        text["models"] = tiny().models
    for name, value in [*SMALL.items(), *text.items(), *changes]:
        if name in names:
            if value == "OTHER":
                value = str(probes.place() / "others.jsonl")
            settings.put(config, name, tiny().models[::-1] if value == "SWAPPED" else value)
    return config


@cache
def seen(kind, probe, changes):
    """What a probe sees, as text that is equal for equal things alone."""
    tiny()
    return spelled(probe(config_of(kind, *changes)))


def spelled(value) -> str:
    if isinstance(value, (np.ndarray, jax.Array)):
        return hashlib.sha256(np.asarray(value).tobytes()).hexdigest() + str(value.shape)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(spelled, value))}]"
    return str(value)


CASES = [(kind, name, turn) for kind in KINDS for name, turn in TURNED[kind].items()]


@pytest.mark.parametrize(
    ("kind", "name", "turn"), CASES, ids=[f"{k.__name__}-{n}" for k, n, _ in CASES]
)
def test_turning_a_setting_changes_something(kind, name, turn):
    turned = (*turn.given, (name, turn.other))
    before = seen(kind, turn.probe, turn.given)
    assert seen(kind, turn.probe, turned) != before, f"{name}={turn.other} changes nothing"


PROBES = sorted({turn.probe for *_, turn in CASES}, key=lambda probe: probe.__name__)


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_a_probe_sees_the_same_twice(probe):
    """Else every setting would seem to change something."""
    kind = next(k for k, _, turn in CASES if turn.probe is probe)
    tiny()
    assert spelled(probe(config_of(kind))) == seen(kind, probe, ())


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_turned_somewhere(kind):
    there = set(settings.settings(kind))
    known = [*TURNED[kind], *" ".join(ELSEWHERE[kind].values()).split()]
    missing, gone = sorted(there - set(known)), sorted(set(known) - there)
    assert not missing, (
        f"{kind.__name__} has settings that nothing turns: {', '.join(missing)}. Add each to "
        "TURNED in tests/test_options.py with another value and the probe that must see it, or to "
        "ELSEWHERE beside the test that turns it."
    )
    assert not gone, f"tests/test_options.py names settings that are no more: {', '.join(gone)}."
    assert len(known) == len(set(known))


@pytest.mark.parametrize("kind", KINDS)
def test_tests_that_turn_settings_elsewhere_are_there(kind):
    for test, names in ELSEWHERE[kind].items():
        file, _, function = test.partition(".")
        text = (HERE / f"{file}.py").read_text(encoding="utf-8")
        assert re.search(rf"^def {function}\(", text, re.MULTILINE), f"there is no {test}"
        for name in names.split():
            last = name.rpartition(".")[2]
            assert re.search(rf"\b{last}\b", text), f"{file}.py says nothing of {name}"

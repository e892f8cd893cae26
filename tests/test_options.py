"""No option does nothing: every setting is turned, and something that a run makes must change.

A new setting needs one line here. Where a small function of the library can show what it does, add
it to ``TURNED``: a value other than the default, and the probe (a function below, from a config to
what is compared) that must see it. Where only a whole stage can, and a test of that stage turns it,
add its name to ``ELSEWHERE`` beside that test.

Probes of training look at what the loop is asked to do, not at its result: the traced first state
and step with their constants, the order of rows, steps, seed and checkpoints. That takes no
compilation.
"""

import dataclasses
import hashlib
import re
from functools import cache, partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_run
from map_problems import fit_one, make_problem

from crossdict_jax import maps, models, modules, settings
from crossdict_jax.activations import extract as extraction
from crossdict_jax.activations.masking import masked
from crossdict_jax.activations.splice import Passages
from crossdict_jax.activations.store import Rows, Store, shard_name
from crossdict_jax.activations.text import load_corpus
from crossdict_jax.benchmark import ensemble as benchmark_ensemble
from crossdict_jax.benchmark import extraction as benchmark_extraction
from crossdict_jax.benchmark import scaling, steps, whole
from crossdict_jax.benchmark_config import BenchmarkConfig
from crossdict_jax.causal import prompts
from crossdict_jax.causal.images import rung_groups
from crossdict_jax.config import (
    Config,
    ConvertConfig,
    PretrainConfig,
    VerifyConfig,
    crosscoder_settings,
)
from crossdict_jax.dictionaries import crosscoder_training, train
from crossdict_jax.evaluation import reconstruction
from crossdict_jax.maps import ensemble, hypernetwork
from crossdict_jax.maps.controls import control_tasks
from crossdict_jax.models import Site
from crossdict_jax.pretraining import language_model
from crossdict_jax.training.mesh import make_mesh
from crossdict_jax.workdir import Workdir

HERE = Path(__file__).parent
KINDS = (Config, PretrainConfig, ConvertConfig, VerifyConfig, BenchmarkConfig)


# ---------------------------------------------------------------- what is compared


class Asked(Exception):
    """Ends a stage at the training loop; holds what the loop was asked to do."""


def traced(function, *shapes) -> list:
    """A function's program and its constants; addresses of objects are left out of it."""
    closed = jax.make_jaxpr(function)(*shapes)
    consts = [hashlib.sha256(np.asarray(c).tobytes()).hexdigest() for c in closed.consts]
    return [re.sub(r"0x[0-9a-f]+", "", str(closed)), *consts]


def what_is_asked(trainable, *, feed, steps, seed, checkpoint_every, meta, **_):
    """Stands in for the training loop. Of ``meta``, which holds all settings, members alone."""
    order = feed.indices(0, 2)
    one = jax.tree.map(lambda a: np.asarray(a)[0], order)
    batch = jax.eval_shape(feed.select, feed.resident, one)
    key = jax.random.key(0)
    state = jax.eval_shape(trainable.init, key)
    raise Asked(
        traced(trainable.init, key),
        traced(trainable.step, state, batch, 0, key),
        [np.asarray(a).tolist() for a in jax.tree.leaves(order)],
        (steps, seed, checkpoint_every, meta.get("members")),
    )


def asked(module, stage, *arguments):
    """What a stage asks of the loop that its module imports, on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", what_is_asked)
        if hasattr(module, "make_mesh"):
            patch.setattr(module, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
        with pytest.raises(Asked) as caught:
            stage(*arguments)
    return caught.value.args


@cache
def place() -> Path:
    """A folder for everything that probes read; ``HOME`` is set by a fixture."""
    return HOME[0]


HOME: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    HOME.append(tmp_path_factory.mktemp("options"))
    yield
    HOME.clear()
    for cached in (place, tiny, problem, seen):
        cached.cache_clear()


@cache
def tiny() -> Config:
    """Two small models, and a text of which every line is a document of two columns."""
    config = tiny_run.make_config(place())
    lines = [f'{{"text": "{t}", "other": "{t[::-1]}"}}\n' for t in tiny_run.make_texts(60)]
    (place() / "lines.jsonl").write_text("".join(lines))
    (place() / "others.jsonl").write_text("".join(lines[::-1]))
    return config


def corpus(config):
    """The documents, and which split each is of."""
    return [(d.text, d.split) for d in load_corpus(config.text).documents]


def plan(config):
    """Which windows are read, by which tokens, and how they are stored."""
    made = extraction._plan(config, [loaded(path) for path in config.models])
    return made.table.ids, made.table.offsets, made.rows.byte_end, made.shard_starts


loaded = cache(models.load)


def sites(config):
    """The models that are read, the sites they are read at, and what dictionaries write."""
    reads = []

    def stop(*_):
        raise Asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction.models, "load", loaded)
        patch.setattr(extraction.models, "check_site", lambda c, s, name: reads.append((name, s)))
        patch.setattr(extraction, "_plan", stop)
        with pytest.raises(Asked):
            extraction.extract(config, Workdir(place() / "nowhere"))
    return reads


def reader(config):
    """How a model is read: windows per forward, and the program."""
    lm = loaded(tiny().models[0])
    made = extraction.Reader(config.extract, lm, [Site(1)], None)
    tokens = jax.ShapeDtypeStruct((8, 16), np.int32)
    return made.batch_size, traced(made._run, modules.split(lm)[1], tokens)


def mask(config):
    """Which of 40 rows are left out: one is 20 times as long as most, one is not finite."""
    x = np.ones((40, 4))
    x[7], x[9] = 20, np.nan
    path = place() / "masked" / shard_name("a", "resid_pre.1", 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, x.astype(ml_dtypes.bfloat16).view(np.uint16))
    n = np.arange(40, dtype=np.int32)
    rows = Rows(n, n, n, n[:, None], n[:, None], np.zeros(40, np.int8), n >= 0)
    how = {"shards": 1, "documents": [str(i) for i in n]}
    try:
        return masked(config.extract, place() / "masked", {"a": [Site(1)]}, rows, **how).keep
    except settings.UserError as error:
        return str(error)


class Four(Store):
    """Four layers of two models, 64 rows of 6 numbers each."""

    def __init__(self):
        pass

    models = ("a", "b")
    sites_of = staticmethod(lambda model: tuple(map(Site, range(4))))
    output_of = staticmethod(lambda model, site: (model, site))
    d_model = staticmethod(lambda model: 6)
    select = staticmethod(lambda split: np.arange(64))

    def read(self, model, site, rows):
        seed = ("ab".index(model), site.layer)
        x = np.random.default_rng(seed).normal(size=(64, 6))
        return x[rows].astype(ml_dtypes.bfloat16)


def dictionaries(config):
    """What is asked of the loop for the run's dictionaries (the first group of equal shape)."""
    return asked(train, train.train_dictionaries, config, Four(), Workdir(place() / "d"))


def crosscoders(config):
    """What is asked of the loop for one joint code of two models."""
    x = np.random.default_rng(0).normal(size=(64, 9)).astype(np.float32)
    rows = [crosscoder_training.Rows("a", (x[:, :4], x[:, 4:]), config.seed)]
    fit = partial(crosscoder_training.fit_crosscoders, directory=place() / "c")
    return asked(crosscoder_training, fit, rows, crosscoder_settings(config))


@cache
def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2300, 5))
    tokens = rng.integers(0, 9, len(x))
    return make_problem(x, np.maximum(x[:, :4] + x[:, 1:], 0), tokens=tokens)[0]


def trained_map(config):
    """What is asked of the loop for the `mlp`."""
    fit = partial(maps.rung("mlp").fit, seed=config.seed, directory=place() / "m")
    return asked(ensemble, fit, [problem()], config.map)


def network(config):
    """What is asked of the loop for the `hypernetwork`."""
    fit = partial(maps.rung("hypernetwork").fit, seed=config.seed, directory=place() / "h")
    return asked(hypernetwork, fit, [problem()], config.map)


def closed_forms(config):
    """The parameters of the rungs that have one to choose."""
    fitted = [fit_one(kind, problem(), place(), config.map) for kind in ("ridge", "low_rank")]
    fitted += [fit_one("token", problem(), place(), config.map)]
    return [np.asarray(a) for f in fitted for a in jax.tree.leaves(modules.split(f.map)[1])]


def ladder(config):
    """The maps of the run, and their controls."""
    return maps.tasks(config, Four()), control_tasks(config, Four())


def resampled(config):
    """How documents are drawn for intervals."""
    draws = reconstruction._draw(config, np.repeat(np.arange(6), 5))
    return draws.mean(np.arange(30.0)).samples


def batches(config):
    """How many rows of a dictionary are measured at a time."""
    sizes = []

    def measure(*_, size, **__):
        sizes.append(size)
        raise Asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "measure", measure)
        plain = type("Plain", (), {"transcodes": False})()
        with pytest.raises(Asked):
            reconstruction._figures(config, Four(), "a", Site(0), plain)
    return sizes


def beginnings(config):
    """Which held-out windows prompts are taken from, and how much of each."""
    tokens = tuple(np.arange(40) + 100 * i for i in range(6))
    n = np.arange(6)

    def select(*_, documents, **__):
        return Passages(tokens[:documents], *4 * (n[:documents],))

    store = type("Texts", (Four,), {"has_bos": lambda self, model: None})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "select_passages", select)
        return [t.tolist() for t in prompts._beginnings(config, store, "a")]


def preferences(config):
    """The directions, layer pairs and rungs of contrast sets."""
    asked = config.contrast
    return rung_groups(config, Four(), layers=asked.layers, rungs=asked.rungs)


def timed(config):
    """What benchmarks of training and of extraction run."""

    def stop(extract, *_):
        raise Asked(extract)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_extraction, "Reader", stop)
        with pytest.raises(Asked) as caught:
            list(benchmark_extraction.benchmark(config, place(), {}))
    trained = [steps.sae_config(config.steps, a) for a in config.steps.architectures]
    return *caught.value.args, *trained, scaling._settings(config.scaling)


def large(config):
    """The command of the whole run, and the language models it reads."""

    def stop(command, **_):
        raise Asked(command[1:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole.subprocess, "run", stop)
        with pytest.raises(Asked) as caught:
            whole._run(Path("run"), ["a", "b"], config.whole)
    return *caught.value.args, whole.shapes(config.whole)


def together(config):
    """The dictionaries that are timed as one ensemble."""

    def stop(**settings):
        raise Asked(settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_ensemble, "make_store", lambda *_, **__: None)
        patch.setattr(benchmark_ensemble, "SAEConfig", stop)
        with pytest.raises(Asked) as caught:
            list(benchmark_ensemble.benchmark(config, place(), {}))
    return caught.value.args


def probed(config):
    """The directions, layer pairs and rungs of probes."""
    asked = config.probe
    return rung_groups(config, Four(), layers=asked.layers, rungs=asked.rungs, of_tokens=True)


def pretraining(config):
    """What is asked of the loop for a language model."""
    tokens = np.arange(4000, dtype=np.int32) % 300
    return asked(language_model, language_model._train, config, tokens, place() / "lm")


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
        "controls": Turn(("skyline",), ladder),
        "control_kinds": Turn(("ridge",), ladder),
        "control_pairs": Turn(1, ladder, given(layers=(1, 2))),
        "text.window_tokens": Turn(12, plan),
        "extract.batch_size": Turn(16, reader),
        "extract.shard_windows": Turn(3, plan),
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
        "contrast.layers": Turn("all", preferences, given(layers=(1, 2))),
        "contrast.rungs": Turn(("ridge",), preferences),
        "probe.layers": Turn("all", probed, given(layers=(1, 2))),
        "probe.rungs": Turn(("ridge",), probed),
        "steer.documents": Turn(2, beginnings),
        "steer.prompt_tokens": Turn(5, beginnings),
    },
    PretrainConfig: TEXT
    | {
        "model_type": Turn("gpt_neox", pretraining),
        "d_model": Turn(32, pretraining),
        "n_layers": Turn(2, pretraining),
        "n_heads": Turn(1, pretraining),
        "context": Turn(16, pretraining),
        "vocab_size": Turn(310, pretraining),
        "rotary_fraction": Turn(0.5, pretraining, given(model_type="gpt_neox")),
        "steps": Turn(50, pretraining),
        "batch_size": Turn(4, pretraining),
        "learning_rate": Turn(1e-3, pretraining),
        "warmup_fraction": Turn(0.5, pretraining),
        "weight_decay": Turn(0.2, pretraining),
        "gradient_clip": Turn(0.5, pretraining),
        "matmul_dtype": Turn("bfloat16", pretraining),
        "checkpoint_every": Turn(3, pretraining),
        "seed": Turn(1, pretraining),
    },
    ConvertConfig: {},
    VerifyConfig: {},
    BenchmarkConfig: {
        "steps.matmul_dtype": Turn("bfloat16", timed),
        "extraction.matmul_dtype": Turn("bfloat16", timed),
        "scaling.matmul_dtype": Turn("bfloat16", timed),
        "ensemble.matmul_dtype": Turn("bfloat16", together),
        "whole.n_layers": Turn(9, large),
        "whole.d_model": Turn(128, large),
        "whole.n_heads": Turn(2, large),
        "whole.layers": Turn((3,), large),
        "whole.documents": Turn(9, large),
        "whole.bytes": Turn(99, large),
        "whole.width": Turn(64, large),
        "whole.sae_steps": Turn(7, large),
        "whole.map_steps": Turn(7, large),
        "whole.matmul_dtype": Turn("bfloat16", large),
    },
}

# Settings that a test of their stage turns: {test: names with blanks between}.
ELSEWHERE = {
    Config: {
        "test_records.test_every_point_is_handed_on_once_over_all_runs": "records",
        "test_convert.test_a_source_takes_the_place_of_training": "sae.sources",
        "test_convert.test_codes_before_the_selection_on_demand": "sae.source_codes",
        "test_crosscoder_map.test_a_model_beside_itself_shares_its_latents": ""
        "crosscoder.self_nulls",
        "test_attribution.test_as_many_features_are_shown_as_asked": "evaluation.features_shown",
        "test_evaluation.test_the_pool_is_fixed_and_as_large_as_asked": "evaluation.pool",
        "test_shared_features.test_every_setting_matters": "evaluation.matching "
        "evaluation.minimum_firings evaluation.fdr",
        "test_shared_features.test_every_layer_is_compared_with_every_other": ""
        "evaluation.similarity_rows",
        "test_efficiency.test_every_map_is_scored_at_every_number_of_rows": "efficiency.rows "
        "efficiency.hidden_features",
        "test_efficiency.test_the_middle_layer_pair_is_left_out_by_default": ""
        "efficiency.layer_pair",
        "test_pareto.test_every_setting_has_a_row": "pareto.architectures pareto.k "
        "pareto.penalties",
        "test_causal_features.test_documents_bound_the_text": "intervention.documents",
        "test_stitching.test_the_size_of_a_batch_changes_nothing": "intervention.batch_size",
        "test_causal_features.test_settings_change_the_rows": "intervention.features "
        "intervention.alphas intervention.norm intervention.kl_budget",
        "test_causal_features.test_settings_reach_the_plan": "intervention.contexts "
        "intervention.promoted intervention.random_directions intervention.shuffled_features "
        "intervention.fdr intervention.span intervention.positions",
        "test_causal_features.test_named_features_are_the_first_models": "intervention.feature_ids",
        "test_causal_features.test_matched_features_come_from_the_file": "intervention.choose",
        "test_causal_features.test_all_layer_pairs_or_the_middle_one": "intervention.layers",
        "test_causal_features.test_rungs_are_those_that_read_more_than_tokens": ""
        "intervention.rungs",
        "test_contrast.test_settings_change_the_rows": "contrast.features contrast.span "
        "contrast.pairs",
        "test_contrast.test_a_folder_is_all_its_files": "contrast.source",
        "test_probe.test_settings_change_the_rows": "probe.pooling probe.draws probe.examples "
        "probe.test_fraction",
        "test_probe.test_bad_texts_are_named": "probe.text probe.label",
        "test_probe.test_missing_files_are_named": "probe.source",
        "test_probe.test_a_probe_is_the_minimum_of_its_loss": "probe.penalties",
        "test_probe.test_rows_are_what_the_models_read_there": "probe.batch_size",
        "test_contrast.test_one_step_is_the_slope_of_the_preference": "contrast.steps",
        "test_contrast.test_controls_have_the_norm_of_the_cut": "contrast.controls",
        "test_contrast.test_edges_between_the_chosen_features_of_two_sites": "contrast.edges",
        "test_contrast.test_batches_and_devices_change_nothing": "contrast.batch_size",
        "test_steering.test_mistakes_are_told_in_one_line": "steer.source steer.target "
        "steer.layer_pair",
        "test_steering.test_every_edit_has_its_texts_and_rates": "steer.feature steer.image "
        "steer.alphas steer.samples steer.tokens steer.promoted",
        "test_generation.test_a_text_depends_on_its_own_row_alone": "steer.batch_size",
        "test_steering.test_the_image_of_the_map_is_put_in_at_the_asked_norm": "steer.norm "
        "steer.positions",
        "test_steering.test_a_search_lists_features_and_takes_the_first": "steer.search",
        "test_steering.test_prompts_come_from_a_file_too": "steer.prompts",
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
        "test_speed.test_a_workdir_knows_its_settings": "benchmarks",
        "test_speed.test_contenders_take_turns_and_the_first_run_does_not_count": "repeats",
        "test_speed.test_ceilings_are_measured_for_every_dtype": "ceilings.matmul_size "
        "ceilings.copy_bytes ceilings.dtypes",
        "test_speed.test_steps_are_measured_without_any_peer": "seed steps.architectures "
        "steps.d_model steps.width steps.k steps.batch_size steps.rows steps.steps",
        "test_speed.test_layers_are_read_as_torch_reads_them": "extraction.n_layers "
        "extraction.d_model extraction.n_heads extraction.vocab_size extraction.layers "
        "extraction.windows extraction.window_tokens extraction.batch_size",
        "test_speed.test_the_map_is_measured": "map.d_model map.width map.k map.hidden "
        "map.batch_size map.steps",
        "test_speed.test_the_store_is_read_beside_a_copy": "store.rows store.d_model",
        "test_speed.test_growth_is_measured_against_the_base": "scaling.architecture "
        "scaling.d_model scaling.width scaling.k scaling.batch_size scaling.rows "
        "scaling.widths scaling.d_models scaling.ks scaling.batch_sizes "
        "scaling.members scaling.store_rows scaling.steps",
        "test_speed.test_an_ensemble_is_measured_beside_its_members": "ensemble.architecture "
        "ensemble.batch_size ensemble.d_model ensemble.k ensemble.members ensemble.rows "
        "ensemble.steps ensemble.width",
        "test_speed.test_memory_is_measured_beside_its_prediction": "memory.architecture "
        "memory.d_model memory.k memory.batch_size memory.widths",
        "test_speed.test_documents_are_read_in_two_amounts": "documents.documents "
        "documents.times documents.bytes",
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
    "extraction.d_model": 16,
    "extraction.n_heads": 2,
    "extraction.n_layers": 1,
    "extraction.layers": (0,),
    "extraction.vocab_size": 50,
    "text.documents": 40,
    "text.validation_fraction": 0.3,
    "text.test_fraction": 0.3,
}


def config_of(kind, *changes):
    """The small config of a kind with settings changed."""
    config, names = kind(), settings.settings(kind)
    text = {"text.source": str(place() / "lines.jsonl")}
    if kind is Config:
        text["models"] = tiny().models
    for name, value in [*SMALL.items(), *text.items(), *changes]:
        if name in names:
            if value == "OTHER":
                value = str(place() / "others.jsonl")
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


@pytest.mark.parametrize("probe", sorted({turn.probe for *_, turn in CASES}, key=str), ids=str)
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

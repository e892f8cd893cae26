"""Every setting of every command: its default, its help text and its rule in one place."""

# Annotations stay objects (no postponed evaluation): parsing and checks read them as types.
import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from crossdict_jax.config.rules import (
    ABOVE_0,
    DOSE,
    DTYPES,
    FILLED,
    ROWS_OR_0,
    SEARCH,
    SEED,
    SHARE,
    SHARE_OR_0,
    SHARE_OR_0_OR_1,
    SHARE_OR_1,
    SIGNED_DOSE,
    SITE_OR_NONE,
    SITES,
    TWO_OR_0,
    architectures,
    at_least,
    choice,
    gate_files,
    map_kinds,
    measurements,
    one_of,
    optional,
    setting,
)
from crossdict_jax.errors import UserError
from crossdict_jax.results import MAP_ORDER

# A sweepable setting: each value of a tuple becomes ensemble members.
Number = float | tuple[float, ...]
Count = int | tuple[int, ...]
SWEPT = ("width", "k", "learning_rate", "l1_coefficient")  # of SAEConfig

DEFAULT_MAPS = tuple(kind for kind in MAP_ORDER if kind not in ("token_target", "hypernetwork"))
# ceiling: from a second dictionary of the target itself, the most that a map can reach.
# untrained: to the target with all its weights redrawn.
# reseeded: trained maps that read features, from another seed: are their weights stable?
CONTROLS = ("ceiling", "untrained", "reseeded")
Names, Ints, Numbers = tuple[str, ...], tuple[int, ...], tuple[float, ...]
MAP_HEADS = ("relu", "topk", "jumprelu")  # as in maps/network.py, which is slow to import
MATMUL = "Inputs of matrix products; auto: bfloat16 on GPU and TPU, float32 on CPU"
CHECKPOINTS = "Training steps between checkpoints; multiples of 50 give the same results"
MAPS = "Maps to use, of map.kinds"
NORM = "What 1 means in alphas: median norm of the site's activations, or a norm of the direction"
HUB = "hub:OWNER/NAME[/FOLDER]"


@dataclass
class TextConfig:
    """Where documents come from and how they are cut and split."""

    source: str = setting(
        "docstrings", "docstrings, a file or folder, or hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]", FILLED
    )
    column: str = setting("text", "Field of .jsonl and .parquet rows that holds the text", FILLED)
    documents: int = setting(1000, "Documents in all, before they are split", at_least(3))
    max_bytes: int = setting(2048, "Bytes to read of a document; the rest is cut off", at_least(1))
    window_tokens: int = setting(256, "Tokens per window, or the model's context", at_least(2))
    validation_fraction: float = setting(0.1, "Share of documents on which choices are made", SHARE)
    test_fraction: float = setting(0.2, "Share of documents that reported numbers are of", SHARE)

    def check(self) -> None:
        if self.validation_fraction + self.test_fraction >= 1:
            raise UserError(
                f"text.validation_fraction={self.validation_fraction} and text.test_fraction="
                f"{self.test_fraction} leave nothing to train on; their sum must be below 1."
            )


@dataclass
class ExtractConfig:
    """How language models are read."""

    batch_size: int = setting(32, "Windows of text per forward pass and device", at_least(1))
    norm_mask: float = setting(10.0, "Drop rows longer than this multiple of the median", ABOVE_0)
    control_tokens: str = choice("Rows after a control token that a text spells", "keep", "skip")
    nonfinite: str = choice("What to do with rows of NaN or infinity", "refuse", "skip")
    matmul_dtype: str = choice(MATMUL, *DTYPES)


@dataclass
class SAEConfig:
    """One ensemble of dictionaries: every model, layer and seed."""

    architecture: str = setting("topk", "Kind of dictionary", one_of(*architectures()))
    output_site: str = setting("", "What transcoders write, as in mlp_out", SITE_OR_NONE)
    sources: Names = setting(
        (), f"Dictionary of each model: train, a folder or {HUB}", FILLED, empty=True, repeat=True
    )
    source_names: str = choice("Sources that name another model or site", "check", "ignore")
    source_codes: str = choice("Features of sources; relu: without TopK", "own", "relu")
    width: Count = setting(4096, "Features per dictionary, or several", at_least(1))
    k: Count = setting(32, "Active features per row of topk kinds, or several", at_least(1))
    l1_coefficient: Number = setting(1.0, "Weight of the sparsity penalty, or several", at_least(0))
    learning_rate: Number = setting(
        0.0, "Learning rate of Adam, or several; 0: by width, 2e-3 for topk at 4096", at_least(0)
    )
    steps: int = setting(2500, "Training steps", at_least(1))
    batch_size: int = setting(1024, "Rows per training step", at_least(1))
    accumulate: int = setting(1, "Parts of a batch, one after another, to save memory", at_least(1))
    seeds: int = setting(1, "Dictionaries per model and layer", at_least(1))
    dead_after_rows: int = setting(
        0, "Rows without firing after which a feature is dead; 0: 2 % of all rows read", at_least(0)
    )
    l0_target: float = setting(0.0, "Active features that jumprelu aims for; 0: none", at_least(0))
    nested_fractions: Numbers = setting(
        (0.25, 0.5), "Nested widths of matryoshka, as shares", SHARE_OR_1
    )
    matmul_dtype: str = choice(MATMUL, *DTYPES)
    products: str = choice(
        "Codes of topk kinds: matrices, lists (CPU) or kernels (GPU)",
        "auto",
        "dense",
        "lists",
        "kernels",
    )

    def check(self) -> None:
        several = [name for name, values in swept(self).items() if len(values) > 1]
        several += ["seeds"] * (self.seeds > 1)
        if several and set(self.sources) - {"train"}:
            raise UserError(
                f"sae.sources names one dictionary for each model, and sae.{several[0]} "
                "asks for several; give one value."
            )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"sae.accumulate={self.accumulate} must divide sae.batch_size={self.batch_size}: "
                "parts are of equal size."
            )


@dataclass
class LossWeights:
    """Weights of the four losses of a trained map (each mean over the batch)."""

    mse: float = setting(1.0, "Weight of the mean squared error", at_least(0))
    cosine: float = setting(1.0, "Weight of 1 - cosine of prediction and target", at_least(0))
    correlation: float = setting(0.05, "Weight of the features' correlations", at_least(0))
    sparsity: float = setting(0.01, "Weight of firing rates and active features", at_least(0))

    def check(self) -> None:
        if not any(vars(self).values()):
            raise UserError("map.loss_weights are all 0, which trains nothing; raise one.")


@dataclass
class HypernetworkConfig:
    """The network that writes maps."""

    rank: int = setting(64, "Rank of the weights that the network writes", at_least(1))
    steps: int = setting(300, "Training steps", at_least(1))


@dataclass
class MapConfig:
    """The maps, and how the trained ones are trained."""

    kinds: Names = setting(DEFAULT_MAPS, "Maps to fit", one_of(*map_kinds()))
    ridge_penalties: Numbers = setting(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0), "To choose from, times the variance", ABOVE_0
    )
    hidden: int = setting(512, "Units per hidden layer of mlp and token_mlp", at_least(1))
    head: str = setting("jumprelu", "What makes features 0; relu if mse is 0", one_of(*MAP_HEADS))
    dropout: float = setting(0.0, "Share of hidden units dropped while training", SHARE_OR_0)
    steps: int = setting(1000, "Training steps", at_least(1))
    batch_size: int = setting(128, "Rows per training step", at_least(1))
    learning_rate: float = setting(3e-3, "Learning rate of AdamW, with cosine decay", ABOVE_0)
    matmul_dtype: str = choice(MATMUL, *DTYPES)
    loss_weights: LossWeights = field(default_factory=LossWeights)
    hypernetwork: HypernetworkConfig = field(default_factory=HypernetworkConfig)


@dataclass
class CrosscoderConfig:
    """Joint dictionaries: one code of all models for each layer tuple, and its controls."""

    # l1 invents latents that belong to one model.
    variant: str = choice("Kind of crosscoder", "batchtopk", "l1")
    width: int = setting(0, "Latents; 0: sae.width", at_least(0))
    l1_coefficient: float = setting(1.0, "Weight of the penalty of variant l1", at_least(0))
    shared_fraction: float = setting(1.0, "Share of latents for all models", SHARE_OR_0_OR_1)
    drop_probability: float = setting(0.5, "Chance that a row leaves a model out", SHARE_OR_0)
    learning_rate: float = setting(
        0.0, "Learning rate of Adam; 0: sae.learning_rate, or by width", at_least(0)
    )
    steps: int = setting(0, "Training steps; 0: sae.steps", at_least(0))
    self_nulls: int = setting(0, "Layers at which a model meets itself", at_least(0))

    def check(self) -> None:
        if self.variant != "l1" and self.l1_coefficient != CrosscoderConfig.l1_coefficient:
            raise UserError(
                f"crosscoder.l1_coefficient={self.l1_coefficient} means nothing to "
                f"crosscoder.variant={self.variant}, only to l1; leave it out."
            )


@dataclass
class EvaluationConfig:
    """How held-out numbers are made."""

    bootstrap: int = setting(200, "Resamples of documents for 95 % intervals", at_least(10))
    pool: int = setting(0, "Candidates in retrieval; 0: all rows up to 8192", TWO_OR_0)
    batch_size: int = setting(1024, "Rows per pass of a map or dictionary", at_least(1))
    matching: str = choice("How features are matched by correlation", "mutual_best", "hungarian")
    minimum_firings: int = setting(30, "Training rows on which it fires", at_least(1))
    fdr: float = setting(0.05, "False discovery rate of confirmed matches", SHARE)
    similarity_rows: int = setting(2000, "Rows on which layers are compared; 0: none", ROWS_OR_0)


@dataclass
class EfficiencyConfig:
    """How much paired data a map is worth: launch.efficiency."""

    rows: Ints = setting((32, 128, 512, 2048, 8192), "Paired rows to fit on", at_least(2))


@dataclass
class ParetoConfig:
    """Which dictionaries make the curves of L0 against FVU: launch.pareto."""

    architectures: Names = optional("Kinds of dictionary; blank: all", one_of(*architectures()))
    k: Ints = optional("k on the run's text; blank: 1/4, 1/2, 1 and 2 times sae.k", at_least(1))
    penalties: Numbers = setting((0.25, 0.5, 1.0, 2.0, 4.0), "Shares of the usual penalty", ABOVE_0)


@dataclass
class InterventionConfig:
    """How much text the causal tests read, and how single features are put to the test."""

    documents: int = setting(64, "Test documents to read at most", at_least(1))
    batch_size: int = setting(16, "Windows of text per forward pass and device", at_least(1))
    features: int = setting(16, "Source features to test per direction; 0: none", at_least(0))
    feature_ids: Ints = optional("Features of the first model to test, as in 3,17", at_least(0))
    choose: str = choice("Random features that fire, or the best matched", "random", "matched")
    layers: str = choice("Layer pairs to test features at", "middle", "all")
    maps: Names = setting(("all",), MAPS, one_of("all", *map_kinds()))
    contexts: int = setting(16, "Positions per feature, where it fires", at_least(1))
    positions: str = choice("Where to edit; prompt: also all before", "firing", "prompt")
    span: str = choice("Tokens of a span to edit", "last", "whole")
    norm: str = choice(NORM, "residual", "feature", "mapped")
    alphas: Numbers = setting((0.05, 0.1, 0.2, 0.4, 0.8), "Doses; the middle one counts", DOSE)


@dataclass
class ContrastConfig:
    """Minimal pairs of sentences, and the features on which a preference rests: launch.contrast."""

    source: Names = optional("Files or folders of sentence pairs, .jsonl or .json", FILLED)
    # Features are chosen on one half of the pairs and tested on the other; each has an interval.
    pairs: int = setting(200, "Sentence pairs of each set at most", at_least(4))
    features: int = setting(8, "Features of largest effect to ablate together", at_least(1))
    # Fewer than 19 never show p = 0.05.
    controls: int = setting(32, "Random directions, and directions of other features", at_least(19))
    maps: Names = setting(("all",), MAPS, one_of("all", *map_kinds()))
    span: str = choice("Tokens of a span to ablate at", "last", "whole")


@dataclass
class SteerConfig:
    """Text that one model writes with a feature of another put in: launch.steer."""

    source: str = setting("", "Name of the model whose feature it is; blank: the first")
    target: str = setting("", "Name of the model that writes; blank: the first other one")
    layer_pair: str = setting("", "Layers of source and target, as in 6:6; blank: the middle pair")
    feature: int = setting(-1, "Number of the source feature; -1: by search", at_least(-1))
    search: str = setting("", "Text around which to look for features that fire", SEARCH)
    map: str = setting("ridge", "What gives the direction", one_of("match", *map_kinds()))
    alphas: Numbers = setting((0.2, 0.4), "Doses; below 0: against the feature", SIGNED_DOSE)
    norm: str = choice(NORM, "residual", "feature", "mapped")
    prompts: str = setting("", "One text, or a .txt file of one a line; blank: test documents")
    samples: int = setting(8, "Texts per prompt; at temperature 0 there is one", at_least(1))
    tokens: int = setting(0, "New tokens per text; 0: 48, or the target's context", at_least(0))
    temperature: float = setting(0.8, "Sampling temperature; 0: the likeliest", at_least(0))


@dataclass
class ProbeConfig:
    """Linear probes of labelled texts, trained on one model and used on another: launch.probe."""

    source: str = setting("", "File of labelled texts, one JSON object a line")
    text: str = setting("text", "Field that holds the text", FILLED)
    label: str = setting("label", "Field that holds the label: text or a whole number", FILLED)
    # Two labelled texts of each fold at least.
    examples: Ints = setting((16, 64, 256), "Labelled texts to train on", at_least(8))
    maps: Names = setting(("all",), MAPS, one_of("all", *map_kinds()))


@dataclass
class Config:
    """A whole run: the models, their layers, and each stage's settings."""

    models: Names = setting(
        (),
        "Two or more folders or hub ids; blank: the embedded pair",
        FILLED,
        empty=True,
        repeat=True,
    )
    layers: Ints = setting((5, 6, 7), "Layers to read in every model", at_least(0))
    layer_pairs: str = setting("", "In place of layers, FIRST:OTHERS, as in 6:10,7:11")
    site: str = setting("resid_pre", "Where in a layer to read", one_of(*SITES))
    seed: int = setting(0, "Random seed for splits, initialisation, batch order and controls", SEED)
    records: Names = optional("Where curves go besides files", one_of("tensorboard", "wandb"))
    controls: Names = setting(
        CONTROLS[:2], "Controls beside shuffled pairs", one_of(*CONTROLS), empty=True
    )
    control_kinds: Names = optional("Maps that get controls; blank: all", one_of(*map_kinds()))
    control_pairs: int = setting(0, "Layer pairs that get controls; 0: all", at_least(0))
    checkpoint_every: int = setting(500, CHECKPOINTS, at_least(1))
    machine: str = setting("", "Machine to compile for, as in v5e-8 or h100-1: launch.compile")
    text: TextConfig = field(default_factory=TextConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    map: MapConfig = field(default_factory=MapConfig)
    crosscoder: CrosscoderConfig = field(default_factory=CrosscoderConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)
    pareto: ParetoConfig = field(default_factory=ParetoConfig)
    intervention: InterventionConfig = field(default_factory=InterventionConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    steer: SteerConfig = field(default_factory=SteerConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def check(self) -> None:
        if len(self.models) == 1:
            raise UserError(
                f"models={self.models[0]} is one model; give two or more with commas between, or "
                "none for the embedded pair."
            )
        if "hypernetwork" in self.map.kinds:
            refuse_transcoders(self, "hypernetwork of map.kinds")
        layer_pairs(self)


@dataclass
class PretrainConfig:
    """A small language model of our own: its shape, its tokenizer, its training."""

    model_type: str = choice("Architecture", "gpt2", "gpt_neox")
    d_model: int = setting(128, "Width of the residual stream", at_least(1))
    n_layers: int = setting(8, "Number of layers", at_least(1))
    n_heads: int = setting(4, "Attention heads; they must divide d_model", at_least(1))
    context: int = setting(256, "Tokens per window", at_least(2))
    # 257: every byte, and the end of a text.
    vocab_size: int = setting(4096, "Tokens of the byte-level BPE to train", at_least(257))
    steps: int = setting(1500, "Training steps", at_least(2))
    batch_size: int = setting(16, "Windows per training step", at_least(1))
    learning_rate: float = setting(4e-3, "Learning rate of Muon and Adam", ABOVE_0)
    matmul_dtype: str = choice(MATMUL, *DTYPES)
    checkpoint_every: int = setting(100, CHECKPOINTS, at_least(1))
    save_dtype: str = setting(
        "float16", "Type of the saved weights", one_of("float32", "float16", "bfloat16")
    )
    seed: int = setting(0, "Random seed for initialisation and batch order", SEED)
    text: TextConfig = field(default_factory=TextConfig)

    def check(self) -> None:
        if self.text.window_tokens != TextConfig.window_tokens:
            raise UserError(
                f"text.window_tokens={self.text.window_tokens} means nothing here: windows are of "
                f"context={self.context} tokens; set context and leave it out."
            )


@dataclass
class ConvertConfig:
    """What is converted, and into which format."""

    source: str = setting("", "A run, a dictionary of any known format, or " + HUB, FILLED)
    format: str = choice("Format to write", "saelens", "crossdict")
    hook_name: str = setting("", "Hook name to write for SAELens; a run knows its own")
    model_name: str = setting("", "Model name to write for SAELens; a run knows its own")
    push: str = setting("", f"Where to upload the result, as in {HUB}; blank: nowhere")


@dataclass
class VerifyConfig:
    """Which known answers the whole machine must give."""

    gates: Names = setting(tuple(gate_files()), "Gates to run", one_of(*gate_files()))
    seed: int = setting(0, "Random seed of everything planted, drawn and trained", SEED)


@dataclass
class BenchmarkConfig:
    """What launch.benchmark measures."""

    suite: str = choice("Sizes for two CPU cores or a large GPU", "cpu", "gpu")
    benchmarks: Names = optional("Measurements; blank: all of the suite", one_of(*measurements()))
    repeats: int = setting(5, "Rounds in which every contender runs once", at_least(1))
    seed: int = setting(0, "Random seed of made-up rows, texts and weights", SEED)


# Settings of Config that no other file of a run depends on: a finished run may change them.
FREE = ("records", "machine", "efficiency", "pareto", "contrast", "steer", "probe")
# Settings that stages after extraction read, and what the first of them write. Whatever evaluates,
# studies too, leaves a stamp, but for the last two.
EVALUATED = ("results/*.inputs.json", "results/pareto.jsonl", "results/steering/*.jsonl")
TESTED = ("results/transfer_features.inputs.json",)
# All read settings of sae.
TRAINED = ("dictionaries", "controls/dictionaries", "crosscoders", "pareto")
STUDIED = ("dictionaries/transfer", "efficiency")  # fit maps of their own
LATER = {"map": ("maps", "controls/maps", *STUDIED)}
LATER["crosscoder"] = ("maps", "crosscoders", "efficiency")
LATER |= {"evaluation": EVALUATED} | {
    f"sae.{f.name}": TRAINED for f in dataclasses.fields(SAEConfig)
}
del LATER["sae.output_site"]  # which is stored, too
LATER |= {f"intervention.{f.name}": TESTED for f in dataclasses.fields(InterventionConfig)}
LATER |= dict.fromkeys(("intervention.documents", "intervention.batch_size"), EVALUATED)
LATER["intervention.span"] = ("results/intervene.inputs.json",)
LATER["intervention.layers"] += ("results/contrast.inputs.json", "results/probe.inputs.json")
LATER["intervention.contexts"] += ("results/steering/*.jsonl",)


to_dict = dataclasses.asdict  # a config of any command as nested dicts of JSON values


def identity(config: Config, *, features: bool = True) -> dict:
    """Returns the settings that identify a run: all but those in ``FREE``.

    ``features``: whether with those that the tests of single features alone read.
    """
    tree = {name: value for name, value in to_dict(config).items() if name not in FREE}
    names = [
        n for n in tree["intervention"] if features or LATER[f"intervention.{n}"][0] not in TESTED
    ]
    return tree | {"intervention": {n: tree["intervention"][n] for n in names}}


def refuse_transcoders(config: Config, name: str) -> None:
    """Raises UserError for transcoders, which ``name`` cannot use."""
    if config.sae.output_site:
        raise UserError(
            f"{name} needs dictionaries that write the site that they read, and sae.output_site="
            f"{config.sae.output_site} makes transcoders; use a run without it."
        )


def swept(sae: SAEConfig) -> dict[str, tuple]:
    """Returns {setting: its values, one or several} of those in ``SWEPT``."""
    values = {name: getattr(sae, name) for name in SWEPT}
    return {name: v if isinstance(v, tuple) else (v,) for name, v in values.items()}


def unswept(sae: SAEConfig) -> SAEConfig:
    """Returns the settings with the first value of each swept one."""
    return dataclasses.replace(sae, **{name: v[0] for name, v in swept(sae).items()})


@dataclass(frozen=True)
class JointSettings:
    """The settings of crosscoders: their own, and those shared with dictionaries."""

    variant: str = "batchtopk"
    width: int = 4096
    k: int = 32
    l1_coefficient: float = 1.0
    shared_fraction: float = 1.0
    drop_probability: float = 0.5
    learning_rate: float = 2e-3
    steps: int = 2500
    batch_size: int = 1024
    dead_after_rows: int = 0
    matmul_dtype: str = "auto"
    products: str = "auto"


def crosscoder_settings(config: Config) -> JointSettings:
    """Returns the settings of a run's crosscoders; 0 stands for the dictionaries' setting.

    Of a swept setting of the dictionaries the first value counts.
    """
    joint, sae = config.crosscoder, unswept(config.sae)
    width = joint.width or sae.width
    rate = joint.learning_rate or sae.learning_rate or 2e-3 * math.sqrt(4096 / width)
    settings = vars(sae) | vars(joint) | {"width": width, "k": min(sae.k, width)}
    settings |= {"learning_rate": rate, "steps": joint.steps or sae.steps}
    return JointSettings(**{f.name: settings[f.name] for f in dataclasses.fields(JointSettings)})


def layer_pairs(config: Config) -> tuple[tuple[int, int], ...]:
    """Returns the pairs (layer of the first model, layer of every other) to fit maps between.

    Without ``config.layer_pairs``, equal layers are paired.

    Raises:
      UserError: ``layer_pairs`` is not N:M with commas between.
    """
    if not config.layer_pairs:
        return tuple((layer, layer) for layer in config.layers)
    parts = [part.strip() for part in config.layer_pairs.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}:[0-9]{1,9}", part) for part in parts):
        raise UserError(
            f"layer_pairs={config.layer_pairs} is not pairs of layers with commas between, as in "
            "6:10,7:11."
        )
    pairs = tuple(tuple(map(int, part.split(":"))) for part in parts)
    if len(set(pairs)) < len(pairs):
        raise UserError(f"layer_pairs={config.layer_pairs} holds a pair twice; give each once.")
    return pairs


def model_layers(config: Config) -> tuple[tuple[int, ...], ...]:
    """Returns per model the layers that are read: ``layers``, or those of ``layer_pairs``."""
    if not config.layer_pairs:
        return tuple(tuple(config.layers) for _ in config.models)
    return _layers_of(config, layer_pairs(config))


def controlled_layers(config: Config) -> tuple[tuple[int, ...], ...]:
    """Returns per model the layers at which maps into it have controls."""
    pairs = layer_pairs(config)
    n, count = len(pairs), min(config.control_pairs or len(pairs), len(pairs))
    return _layers_of(config, [pairs[(2 * i + 1) * n // (2 * count)] for i in range(count)])


def _layers_of(config: Config, pairs: Any) -> tuple[tuple[int, ...], ...]:
    first, others = (tuple(sorted(set(side))) for side in zip(*pairs))
    return (first, *(others for _ in config.models[1:]))

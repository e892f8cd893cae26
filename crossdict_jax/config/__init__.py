"""Every setting of a run, as dataclasses with a unit or a reason beside each number."""

# Annotations stay objects here (no postponed evaluation): flags and checks read them as types.
import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from crossdict_jax.errors import UserError

# A sweepable field takes one number or a tuple of them; each value becomes ensemble members.
# Annotated keeps the union in one piece, which command line flags cannot parse otherwise.
Number = Annotated[float | tuple[float, ...], "number"]
Count = Annotated[int | tuple[int, ...], "count"]


@dataclass
class TextConfig:
    """Where documents come from and how they are cut and split."""

    source: str = "docstrings"  # docstrings | a file or folder (.txt .jsonl .parquet) | hf:NAME...
    column: str = "text"  # the text field of .jsonl and .parquet rows
    documents: int = 1000  # in total, before the split
    max_bytes: int = 2048  # per document, cut at a character; longer documents lose their tail
    window_tokens: int = 256  # at most, for every model; a smaller context of a model wins
    validation_fraction: float = 0.1  # of the documents: hyper-parameters are chosen on them
    test_fraction: float = 0.2  # of the documents: every reported number is of them


@dataclass
class ExtractConfig:
    """How language models are read."""

    batch_size: int = 32  # windows per forward, over all devices
    shard_windows: int = 512  # windows per file of the store: what a kill can lose
    norm_mask: float = 10.0  # rows whose norm exceeds this multiple of the median are dropped
    nonfinite: str = "refuse"  # refuse | skip: rows that hold NaN or infinity
    matmul_dtype: str = "float32"  # float32 | bfloat16, of the language models' matrix products


SWEPT = ("width", "k", "learning_rate", "l1_coefficient")  # of SAEConfig: may have several values


@dataclass
class SAEConfig:
    """One ensemble of dictionaries: every model, layer and seed."""

    architecture: str = "topk"  # a file in crossdict_jax/dictionaries
    output_site: str = ""  # transcoders write another site: [MODEL:]KIND[.LAYER], as in mlp_out
    sources: tuple[str, ...] = ()  # per model train, a folder, or hub:OWNER/NAME/layers.{layer}
    source_codes: str = "own"  # own | relu: of sources, relu(z) before any selection or threshold
    width: Count = 4096  # features
    k: Count = 32  # active features a row (topk; batchtopk, matryoshka: on average)
    l1_coefficient: Number = 1.0  # weight of the penalty: on L1 (relu, gated), on L0 (jumprelu)
    learning_rate: Number = 0.0  # Adam, after warm-up; 0: 2e-3 sqrt(4096 / width), L1 twice that
    steps: int = 2500  # batches
    batch_size: int = 1024  # rows
    accumulate: int = 1  # parts of a batch, one at a time: less memory, the same gradients
    seeds: int = 1  # dictionaries per model and layer
    warmup_fraction: float = 0.05  # of the steps, for the learning rate
    l1_warmup_fraction: float = 0.1  # of the steps, for the L1 coefficient
    gradient_clip: float = 1.0  # largest global norm of a dictionary's gradient
    auxk_coefficient: float = 1 / 32  # where k is, and jumprelu: the dead features' reconstruction
    k_aux: int = 0  # dead features that AuxK uses; 0 means half the size of a row
    dead_after_rows: int = 0  # rows (tokens) of silence that mean dead; 0 means 2 % of all it reads
    bandwidth: float = 0.5  # jumprelu: of the kernel that trains thresholds, in pre-activations
    l0_target: float = 0.0  # jumprelu: active features a row to aim for; 0 means fewest by penalty
    nested_fractions: tuple[float, ...] = (0.25, 0.5)  # matryoshka: of the width
    nested_balance: float = 0.25  # matryoshka: weight of a nested loss to that of the next wider
    matmul_dtype: str = "float32"  # float32 | bfloat16 (FVU within 0.005), of the products
    checkpoint_every: int = 500  # steps


@dataclass
class LossWeights:
    """Weights of the four losses of a trained map (each mean over the batch)."""

    mse: float = 1.0  # mean squared error
    cosine: float = 1.0  # 1 - cosine of a row and its target
    correlation: float = 0.05  # of the features' correlation matrices
    sparsity: float = 0.01  # of firing rates and of active features a row


RUNGS = (
    "mean",
    "token",
    "procrustes",
    "ridge",
    "ridge_codes",
    "low_rank",
    "token_ridge",
    "mlp",
    "token_mlp",
    "crosscoder",
)


@dataclass
class HypernetworkConfig:
    """The network that writes maps: its size, and what keeps it from learning features by heart."""

    rank: int = 64  # of the weights that the network itself writes
    profile_rank: int = 128  # of those that token profiles call for, which it weighs
    hidden: int = 128  # units of each tower's hidden layer
    dropout: float = 0.2  # share of hidden units that a step does without
    feature_dropout: float = 0.2  # share of source features that a step does without
    steps: int = 300  # batches
    batch_size: int = 128  # rows of every problem
    learning_rate: float = 3e-3  # AdamW, linear warm-up, cosine decay
    weight_decay: float = 1e-4  # AdamW
    checkpoint_every: int = 500  # steps


@dataclass
class MapConfig:
    """The rungs of the ladder, and how the trained one is trained."""

    kinds: tuple[str, ...] = RUNGS  # each a file in crossdict_jax/maps
    ridge_penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean variance
    ranks: tuple[int, ...] = (1, 4, 16, 64, 128, 256)  # low_rank: up to the smaller d_model
    token_pseudocounts: tuple[float, ...] = (0.0, 1.0, 4.0, 16.0)  # shrinkage to the mean
    hidden: int = 512  # mlp, token_mlp: units of both hidden layers
    head: str = "jumprelu"  # relu | jumprelu | topk: what makes their features exactly zero
    dropout: float = 0.0  # share of the hidden units that a training row does without
    steps: int = 1000  # batches
    batch_size: int = 128  # rows
    learning_rate: float = 3e-3  # AdamW, cosine decay
    validate_every: int = 50  # steps; the parameters of the best validation score are kept
    patience: int = 5  # validations without a gain, after which a map's training stops
    correlation_features: int = 0  # drawn each step for the correlation loss; 0 means all
    weight_decay: float = 1e-4  # AdamW
    gradient_clip: float = 1.0  # largest global norm
    checkpoint_every: int = 500  # steps
    loss_weights: LossWeights = field(default_factory=LossWeights)
    hypernetwork: HypernetworkConfig = field(default_factory=HypernetworkConfig)


@dataclass
class CrosscoderConfig:
    """Joint dictionaries: one code of all models for each layer tuple, and its controls."""

    variant: str = "batchtopk"  # batchtopk | l1 (invents latents that belong to one model)
    width: int = 0  # latents; 0 means sae.width
    k: int = 0  # batchtopk: active latents a row, on average; 0 means sae.k
    l1_coefficient: float = 1.0  # l1: weight of the penalty
    shared_fraction: float = 1.0  # latents that all models may use; the others belong to one each
    drop_probability: float = 0.5  # a model is left out of a row's code; one at least stays
    learning_rate: float = 0.0  # Adam, with warm-up and decay; 0 means sae.learning_rate
    steps: int = 0  # batches; 0 means sae.steps
    batch_size: int = 0  # rows; 0 means sae.batch_size
    warmup_fraction: float = 0.05  # of the steps, for the learning rate
    l1_warmup_fraction: float = 0.1  # of the steps, for the L1 coefficient
    auxk_coefficient: float = 1 / 32  # batchtopk: of AuxK, the dead latents' reconstruction
    k_aux: int = 0  # dead latents that AuxK uses; 0 means half of all models' d_model
    dead_after_rows: int = 100_000  # a latent silent for this many rows counts as dead
    matmul_dtype: str = "float32"  # float32 | bfloat16, of the encoder and decoder products
    checkpoint_every: int = 500  # steps
    self_nulls: int = 0  # layer tuples at which the first model also stands beside its copies


@dataclass
class EvaluationConfig:
    """How held-out numbers are made."""

    bootstrap: int = 200  # resamples of the test documents, for 95 % intervals
    features_shown: int = 5  # of each pair of sites, the most and the least transferable each
    pool: int = 0  # retrieval candidates; 0 means min(8192, rows)
    batch_size: int = 1024  # rows per forward of a map or dictionary
    matching: str = "mutual_best"  # mutual_best | hungarian, of features by training correlation
    minimum_firings: int = 30  # training rows, for a feature to be matched; rare ones match by luck
    fdr: float = 0.05  # share of false discoveries to allow among confirmed matches
    similarity_rows: int = 2000  # held-out positions at which all layers are compared; 0: no map


@dataclass
class EfficiencyConfig:
    """How much paired data a map is worth: launch.efficiency."""

    rows: tuple[int, ...] = (32, 128, 512, 2048, 8192)  # paired rows to fit on; all come last
    layer_pair: str = ""  # 6:6 is left out of the hypernetwork's training; blank: the middle one
    hidden_features: float = 0.2  # share of every dictionary's features that it never sees


@dataclass
class ParetoConfig:
    """Which dictionaries make the curves of L0 against FVU: launch.pareto."""

    architectures: tuple[str, ...] = ()  # of dictionaries; () means all
    k: tuple[int, ...] = ()  # where k is; () means 1/4, 1/2, 1 and 2 times sae.k
    penalties: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)  # else: of the usual coefficient


@dataclass
class InterventionConfig:
    """How much text the causal tests read, and how single features are put to the test."""

    documents: int = 64  # test documents at most
    batch_size: int = 16  # windows per forward
    features: int = 16  # of A that are put into B, in every direction; 0 for none
    feature_ids: tuple[int, ...] = ()  # in place of features: the first model's own, as in 3,17
    choose: str = "random"  # random (of those that fire) | matched (the best of matches.jsonl)
    layers: str = "middle"  # middle | all, of the layer pairs: where features are put in
    maps: tuple[str, ...] = ("all",)  # whose directions are tested: all, or these of map.kinds
    contexts: int = 16  # positions of the text per feature, where it fires
    positions: str = "firing"  # firing | prompt: edit there alone, or all of the text before too
    span: str = "last"  # last | whole: edit a span's last token, or all of its tokens
    norm: str = "residual"  # what 1 means in alphas: residual (median norm) | feature | mapped
    alphas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)  # doses; scores are of the middle one


@dataclass
class ContrastConfig:
    """Minimal pairs of sentences, and the features on which a preference rests: launch.contrast."""

    source: tuple[str, ...] = ()  # files or folders of .jsonl or .json: agreement, BLiMP, good/bad
    pairs: int = 200  # of each set at most; features are chosen on one half, tested on the other
    features: int = 8  # those of largest attribution, ablated together
    controls: int = 32  # random directions, and as many images of other features, of equal norm
    maps: tuple[str, ...] = ("all",)  # by which they are carried over: all, or these of map.kinds
    span: str = "last"  # last | whole: ablate at a span's last token, or at all of its tokens


@dataclass
class SteerConfig:
    """Text that one model writes with a feature of another put in: launch.steer."""

    source: str = ""  # name of the model whose feature it is; blank: the first
    target: str = ""  # name of the model that writes; blank: the first other one
    layer_pair: str = ""  # 6:6, the source's layer and the target's; blank: the middle one
    feature: int = -1  # of the source; -1: the first that steer.search finds
    search: str = ""  # text: features that fire around it, the one first that most promotes it
    map: str = "ridge"  # of map.kinds: what that map makes of the feature | match: the target's
    alphas: tuple[float, ...] = (0.2, 0.4)  # doses, each another text; below 0 is against it
    norm: str = "residual"  # what 1 means in alphas: residual (median norm) | feature | mapped
    prompts: str = ""  # one text, or a .txt file with one a line; blank: held-out beginnings
    samples: int = 8  # texts of every prompt; at temperature 0 there is one
    tokens: int = 0  # new ones of every text; 0: 48, or as many as the target has positions for
    temperature: float = 0.8  # 0: always the likeliest token
    top_p: float = 0.95  # draw among the likeliest tokens that hold this share of the probability


@dataclass
class ProbeConfig:
    """Linear probes of labelled texts, trained on one model and used on another: launch.probe."""

    source: str = ""  # a file of labelled texts, a JSON object a line
    text: str = "text"  # the field that holds the text
    label: str = "label"  # the field that holds its label: text or a whole number
    pooling: str = "last"  # last | max | mean, over the places of a text that all models share
    examples: tuple[int, ...] = (16, 64, 256)  # labelled texts that a probe is trained on
    maps: tuple[str, ...] = ("all",)  # by which probes are carried: all, or these of map.kinds


# ceiling: from a second dictionary of the target itself, the most that a map can reach.
# untrained: to the target with all its weights drawn anew, what training has nothing to do with.
# reseeded: trained rungs that read features once more from another seed: are their weights stable?
CONTROLS = ("ceiling", "untrained", "reseeded")


@dataclass
class Config:
    """A whole run: the models, their layers, and each stage's settings."""

    models: tuple[str, ...] = ()  # two or more directories or hub ids; () means the embedded pair
    layers: tuple[int, ...] = (5, 6, 7)  # one list for all models
    layer_pairs: str = ""  # in place of layers: 6:10,7:11 pairs the first model's with the others'
    site: str = "resid_pre"  # resid_pre | resid_post | attn_out | mlp_out
    seed: int = 0  # of everything random: another seed is another run
    records: tuple[str, ...] = ()  # tensorboard, wandb: who gets training curves besides jsonl
    controls: tuple[str, ...] = CONTROLS[:2]  # beside shuffled pairs; reseeded too, () for none
    control_kinds: tuple[str, ...] = ()  # rungs that get controls; () means all of map.kinds
    control_pairs: int = 0  # pairs of layers that get controls, evenly spread; 0 means all
    checkpoint_every: int = 500  # steps of any training, which is what a kill can lose
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


@dataclass
class PretrainConfig:
    """A small language model of our own: its shape, its tokenizer, its training."""

    model_type: str = "gpt2"  # gpt2 | gpt_neox
    d_model: int = 128  # the residual stream
    n_layers: int = 8  # so that layers 5, 6 and 7 exist
    n_heads: int = 4  # they divide d_model
    context: int = 256  # tokens
    vocab_size: int = 4096  # byte-level BPE, trained on the train split
    rotary_fraction: float = 0.25  # gpt_neox: share of each head that is rotated
    steps: int = 1500  # batches
    batch_size: int = 16  # windows of `context` tokens, over all devices
    learning_rate: float = 4e-3  # Muon and Adam, linear warm-up, cosine decay to a tenth
    warmup_fraction: float = 0.03  # of the steps
    weight_decay: float = 0.1  # on matrices only
    gradient_clip: float = 1.0  # largest global norm
    matmul_dtype: str = "float32"  # float32 | bfloat16, of the matrix products
    checkpoint_every: int = 100  # steps
    save_dtype: str = "float16"  # float32 | float16 | bfloat16, of the safetensors file
    seed: int = 0  # of everything random
    text: TextConfig = field(default_factory=TextConfig)


@dataclass
class ConvertConfig:
    """What is converted, and into which format."""

    source: str = ""  # a run, a dictionary of any known format, or hub:OWNER/NAME/FOLDER
    format: str = "saelens"  # saelens | crossdict: the checkpoints of this project
    hook_name: str = ""  # written for SAELens; of a run it is known
    model_name: str = ""  # written for SAELens; of a run it is known
    push: str = ""  # hub:OWNER/NAME[/FOLDER] to upload the result to; empty for nowhere


GATES = tuple(f"G{i}" for i in range(1, 11))


@dataclass
class VerifyConfig:
    """Which known answers the whole machine must give."""

    gates: tuple[str, ...] = GATES  # each a file in crossdict_jax/verify
    seed: int = 0  # of everything planted, drawn and trained


@dataclass
class BenchmarkConfig:
    """How fast this code is beside others, at other sizes, and beside another checkout of it."""

    benchmarks: tuple[str, ...] = ()  # files of benchmark/measurements; empty: all of the suite
    suite: str = "cpu"  # cpu | gpu: sizes for two cores, or for one large GPU
    repeats: int = 5  # rounds, in each of which every contender runs once; medians are reported
    seed: int = 0  # of made-up rows, texts and weights


# Settings of Config on which no file of a run depends but the answer to the question that they ask:
# a finished run may be asked again with others.
FREE = ("records", "efficiency", "pareto", "contrast", "steer", "probe")


def to_dict(config: Any) -> dict:
    """Returns a config of any command as nested dicts of JSON values (tuples become lists)."""
    return dataclasses.asdict(config)


def identity(config: Config) -> dict:
    """Returns the settings that make a run the one that it is: all but those that are ``FREE``."""
    return {name: value for name, value in to_dict(config).items() if name not in FREE}


def unswept(sae: SAEConfig) -> SAEConfig:
    """Returns the settings with the first value of each that has several."""
    values = {name: getattr(sae, name) for name in SWEPT}
    first = {name: v[0] if isinstance(v, tuple) else v for name, v in values.items()}
    return dataclasses.replace(sae, **first)


def crosscoder_settings(config: Config) -> CrosscoderConfig:
    """Returns the crosscoders' settings with the dictionaries' in place of every 0 that means them.

    Of a swept setting of the dictionaries the first value counts.
    """
    settings = dataclasses.replace(config.crosscoder)
    for name in ("width", "k", "learning_rate", "steps", "batch_size"):
        if not getattr(settings, name):
            value = getattr(config.sae, name)
            setattr(settings, name, value[0] if isinstance(value, tuple) else value)
    if not config.crosscoder.k:
        settings.k = min(settings.k, settings.width)
    return settings


def layer_pairs(config: Config) -> tuple[tuple[int, int], ...]:
    """Returns the pairs (layer of the first model, layer of every other) to fit maps between.

    Without ``config.layer_pairs``, equal layers are paired.

    Raises:
      UserError: ``layer_pairs`` is not N:M with commas between.
    """
    if not config.layer_pairs:
        return tuple((layer, layer) for layer in config.layers)
    parts = [part.strip() for part in config.layer_pairs.split(",")]
    if not all(re.fullmatch(r"[0-9]+:[0-9]+", part) for part in parts):
        raise UserError(
            f"layer_pairs={config.layer_pairs} is not pairs of layers with commas between, as in "
            "6:10,7:11."
        )
    pairs = tuple(tuple(map(int, part.split(":"))) for part in parts)
    if len(set(pairs)) < len(pairs):
        raise UserError(f"layer_pairs={config.layer_pairs} holds a pair twice; give each once.")
    return pairs


def model_layers(config: Config) -> tuple[tuple[int, ...], ...]:
    """Returns per model the layers that are read: ``layers``, or what ``layer_pairs`` names.

    In ``layer_pairs`` the first number is a layer of the first model, the second one of every
    other model.
    """
    if not config.layer_pairs:
        return tuple(tuple(config.layers) for _ in config.models)
    first, others = (tuple(sorted(set(side))) for side in zip(*layer_pairs(config)))
    return (first, *(others for _ in config.models[1:]))


def controlled_layers(config: Config) -> tuple[tuple[int, ...], ...]:
    """Returns per model the layers at which maps into it have controls."""
    pairs = layer_pairs(config)
    n, count = len(pairs), min(config.control_pairs or len(pairs), len(pairs))
    chosen = [pairs[(2 * i + 1) * n // (2 * count)] for i in range(count)]
    first, others = (tuple(sorted(set(side))) for side in zip(*chosen))
    return (first, *(others for _ in config.models[1:]))

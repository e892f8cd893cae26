"""Every setting of launch.benchmark, as dataclasses with a unit or a reason beside each number."""

# Annotations stay objects here (no postponed evaluation): flags and checks read them as types.
from dataclasses import dataclass, field

BENCHMARKS = (
    "whole",
    "steps",
    "ensemble",
    "extraction",
    "map",
    "store",
    "startup",
    "scaling",
    "memory",
    "documents",
)


@dataclass
class CeilingBenchmark:
    """What the machine can do at most, measured before everything else."""

    matmul_size: int = 3072  # of square products
    copy_bytes: int = 268_435_456  # of the array that is copied: far more than any cache holds
    dtypes: tuple[str, ...] = ("float32",)  # float32, bfloat16: of the products' inputs


@dataclass
class StepBenchmark:
    """One training step of a dictionary, beside those of other libraries."""

    architectures: tuple[str, ...] = ("relu", "topk", "batchtopk", "jumprelu")  # each in turn
    d_model: int = 768  # of the made-up rows
    width: int = 6144  # features
    k: int = 32  # active features a row (topk; batchtopk: on average)
    batch_size: int = 4096  # rows
    rows: int = 16384  # of the store, at least a batch
    matmul_dtype: str = "float32"  # float32 | bfloat16, of our products' inputs; others: float32
    steps: int = 1  # in one measurement, 50 at most


@dataclass
class EnsembleBenchmark:
    """Several dictionaries of one shape in one step, beside one after another."""

    members: int = 6  # dictionaries, of other seeds
    architecture: str = "relu"  # of all
    d_model: int = 768  # of the made-up rows
    width: int = 1024  # features
    k: int = 32  # active features a row
    batch_size: int = 1024  # rows of each
    rows: int = 8192  # of the store, at least a batch
    matmul_dtype: str = "float32"  # float32 | bfloat16, of the products' inputs
    steps: int = 2  # in one measurement, 50 at most


@dataclass
class ExtractionBenchmark:
    """A GPT-2 with random weights, of GPT-2 Medium's sizes, read at some layers."""

    n_layers: int = 24  # blocks
    d_model: int = 1024  # the residual stream
    n_heads: int = 16  # they divide d_model
    vocab_size: int = 50257  # tokens
    layers: tuple[int, ...] = (5, 6, 7)  # what blocks 5, 6 and 7 read
    windows: int = 8  # windows of text
    window_tokens: int = 256  # tokens of the longest
    batch_size: int = 4  # windows per forward
    matmul_dtype: str = "float32"  # float32 | bfloat16, of our products' inputs; others: float32


@dataclass
class MapBenchmark:
    """One training step of the mlp map."""

    d_model: int = 1024  # of the made-up rows
    width: int = 4096  # features of both dictionaries
    k: int = 32  # active features a row
    hidden: int = 512  # units of both hidden layers
    batch_size: int = 128  # rows
    steps: int = 5  # in one measurement, 50 at most


@dataclass
class StoreBenchmark:
    """Reading rows back from a store."""

    rows: int = 131_072  # of one site
    d_model: int = 768  # of the made-up rows


@dataclass
class ScalingBenchmark:
    """How the cost of a training step grows; one thing at a time differs from the base."""

    architecture: str = "topk"  # of the dictionaries
    d_model: int = 512  # of the base
    width: int = 4096  # of the base
    k: int = 32  # of the base
    batch_size: int = 1024  # of the base, in rows
    rows: int = 8192  # of the base's store
    matmul_dtype: str = "float32"  # float32 | bfloat16, of the products' inputs
    steps: int = 1  # in one measurement, 50 at most
    widths: tuple[int, ...] = (1024, 8192, 32_768, 131_072)  # features
    d_models: tuple[int, ...] = (256, 1024, 2048)  # of the rows
    ks: tuple[int, ...] = (8, 128)  # active features a row
    batch_sizes: tuple[int, ...] = (256, 4096)  # rows
    members: tuple[int, ...] = (2, 4)  # dictionaries in one step
    store_rows: tuple[int, ...] = (65_536, 524_288)  # on the device, and on the host


@dataclass
class MemoryBenchmark:
    """Memory of a training at several widths."""

    architectures: tuple[str, ...] = ("topk", "relu", "batchtopk")  # each in turn
    d_model: int = 512  # of the made-up rows
    k: int = 32  # active features a row
    batch_size: int = 1024  # rows
    widths: tuple[int, ...] = (4096, 16_384, 65_536)  # features, each in a fresh process


@dataclass
class DocumentBenchmark:
    """Memory and time of extraction, of a few documents and of many."""

    documents: int = 20  # that are multiplied
    times: tuple[int, ...] = (1, 10, 100)  # by these, ascending, each in a fresh process
    bytes: int = 600  # of each document
    batch_size: int = 8  # windows per forward: few, so that the fewest documents fill it
    shard_windows: int = 32  # windows per shard file: the same


@dataclass
class WholeBenchmark:
    """A whole run of configs/pythia410m_gpt2medium.py, with random weights of these sizes."""

    n_layers: int = 24  # blocks of both models
    d_model: int = 1024  # of both
    n_heads: int = 16  # of both
    layers: tuple[int, ...] = (5, 6, 7)  # that are read
    documents: int = 2000  # docstrings
    bytes: int = 900  # at most of each: about 256 tokens of the embedded tokenizers
    width: int = 4096  # features of every dictionary
    sae_steps: int = 2500  # of every dictionary
    map_steps: int = 1000  # of every trained map
    matmul_dtype: str = "float32"  # float32 | bfloat16, of the models' and dictionaries' products


@dataclass
class BenchmarkConfig:
    """How fast this code is beside others, and beside what the machine can do."""

    # Each a file in crossdict_jax/benchmark. The whole run needs a GPU, or hours.
    benchmarks: tuple[str, ...] = BENCHMARKS[1:]  # what is measured, in this order
    repeats: int = 5  # rounds, of which each contender runs once in each; medians are reported
    seed: int = 0  # of made-up rows, texts and weights
    ceilings: CeilingBenchmark = field(default_factory=CeilingBenchmark)
    steps: StepBenchmark = field(default_factory=StepBenchmark)
    ensemble: EnsembleBenchmark = field(default_factory=EnsembleBenchmark)
    extraction: ExtractionBenchmark = field(default_factory=ExtractionBenchmark)
    map: MapBenchmark = field(default_factory=MapBenchmark)
    store: StoreBenchmark = field(default_factory=StoreBenchmark)
    scaling: ScalingBenchmark = field(default_factory=ScalingBenchmark)
    memory: MemoryBenchmark = field(default_factory=MemoryBenchmark)
    documents: DocumentBenchmark = field(default_factory=DocumentBenchmark)
    whole: WholeBenchmark = field(default_factory=WholeBenchmark)

"""All measurements of speed, at sizes for one H200; a smaller GPU needs smaller widths.

python -m launch.benchmark --config=configs/benchmark_h200.py --workdir=runs/benchmark-h200

Aims: relu of width 32,768 at half of the measured bfloat16 ceiling, six members of width 4096 and
extraction at 40 %; topk at twice the rows a second of relu; the whole run in 90 seconds.
"""

from crossdict_jax.benchmark_config import (
    BENCHMARKS,
    BenchmarkConfig,
    CeilingBenchmark,
    EnsembleBenchmark,
    ExtractionBenchmark,
    MapBenchmark,
    MemoryBenchmark,
    ScalingBenchmark,
    StepBenchmark,
    StoreBenchmark,
    WholeBenchmark,
)


def get_config() -> BenchmarkConfig:
    return BenchmarkConfig(
        benchmarks=BENCHMARKS,
        ceilings=CeilingBenchmark(
            matmul_size=8192, copy_bytes=2**32, dtypes=("float32", "bfloat16")
        ),
        steps=StepBenchmark(
            d_model=1024,
            width=32_768,
            batch_size=8192,
            rows=65_536,
            matmul_dtype="bfloat16",
            steps=20,
        ),
        ensemble=EnsembleBenchmark(
            d_model=1024,
            width=4096,
            batch_size=4096,
            rows=65_536,
            matmul_dtype="bfloat16",
            steps=20,
        ),
        extraction=ExtractionBenchmark(windows=1024, batch_size=64, matmul_dtype="bfloat16"),
        map=MapBenchmark(steps=50),
        store=StoreBenchmark(rows=524_288, d_model=1024),
        scaling=ScalingBenchmark(
            d_model=1024, batch_size=4096, rows=65_536, matmul_dtype="bfloat16", steps=10
        ),
        memory=MemoryBenchmark(d_model=1024, batch_size=4096, widths=(4096, 32_768, 131_072)),
        whole=WholeBenchmark(matmul_dtype="bfloat16"),
    )

"""What the settings of launch.benchmark may be, in the words of settings.py."""

from __future__ import annotations

import dataclasses

from crossdict_jax.benchmark_config import BENCHMARKS, BenchmarkConfig
from crossdict_jax.config import rules as of
from crossdict_jax.config import settings
from crossdict_jax.errors import UserError

CHUNK = of.Rule("1 to 50", lambda value: 1 <= value <= 50)  # as in training/loop.py


def rules() -> dict[str, of.Rule]:
    """Returns what each setting must be: a number counts something, and is 1 or more."""
    names = settings.settings(BenchmarkConfig)
    kinds, positive = of.one_of(*of.architectures()), of.at_least(1)
    usual = {"architecture": kinds, "architectures": kinds, "matmul_dtype": of.DTYPE}
    own = {
        "benchmarks": of.one_of(*BENCHMARKS),
        "seed": of.SEED,
        "ceilings.copy_bytes": of.at_least(1024),
        "ceilings.dtypes": of.DTYPE,
        "steps.steps": CHUNK,
        "ensemble.steps": CHUNK,
        "map.steps": CHUNK,
        "scaling.steps": CHUNK,
        "extraction.layers": of.at_least(0),
        "whole.layers": of.at_least(0),
        "documents.documents": of.at_least(20),  # some for each split
    }
    return {name: own.get(name) or usual.get(name.rpartition(".")[2], positive) for name in names}


def validate(config: BenchmarkConfig) -> None:
    """Raises UserError for the first setting that is outside what it may be."""
    for name, field in settings.settings(BenchmarkConfig).items():
        metadata = {"rule": rules()[name], "repeat": False, "empty": name.startswith("scaling.")}
        replaced = dataclasses.field(metadata=metadata)
        replaced.type = field.type
        settings._check_value(name, settings.get(config, name), replaced)
    check(config)


def check(config: BenchmarkConfig) -> None:
    """Raises UserError for settings that contradict each other."""
    for group in ("steps", "ensemble"):
        own = getattr(config, group)
        if own.batch_size > own.rows:
            raise UserError(
                f"{group}.batch_size={own.batch_size} is more than {group}.rows={own.rows}; "
                "lower it."
            )
        if own.k > own.width:
            raise UserError(f"{group}.k={own.k} is more than {group}.width={own.width}; lower k.")
    for group in ("extraction", "whole"):
        own = getattr(config, group)
        if max(own.layers) >= own.n_layers:
            raise UserError(
                f"{group}.layers={settings.spell(own.layers)} are not all below {group}.n_layers="
                f"{own.n_layers}; lower them."
            )
        if own.d_model % own.n_heads:
            raise UserError(
                f"{group}.n_heads={own.n_heads} does not divide {group}.d_model={own.d_model}; "
                "choose one that does."
            )

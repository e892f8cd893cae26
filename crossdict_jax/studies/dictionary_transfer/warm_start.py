"""How many training steps a dictionary of B is spared that begins as A's, transferred."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from crossdict_jax import maps, modules
from crossdict_jax.activations.store import Store
from crossdict_jax.config import Config
from crossdict_jax.config.settings import refuse_transcoders
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.dictionaries.start import activation_scale
from crossdict_jax.dictionaries.train import Member, members, train_from
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Problem
from crossdict_jax.studies.dictionary_transfer.measure import Place, fit_stitch, places
from crossdict_jax.studies.dictionary_transfer.transferred import (
    is_ours,
    transferred,
    with_unit_rows,
)
from crossdict_jax.workdir import Workdir, read_jsonl, write_jsonl

ERRORS = ("fvu", "mse")  # what the losses of an architecture log of their reconstruction


def compare_starts(config: Config, store: Store, work: Workdir) -> list[dict[str, Any]]:
    """Trains B's dictionaries from random parameters and from A's, and writes what it saves.

    The rows of dictionary_training.jsonl, one per direction and pair of sites: steps [points] and
    the training error up to them from either start (``error`` says which; the same seeds, rows and
    order); fvu_random, fvu_transferred: of the finished ones, on test rows; steps_to_reach: the
    first point at which the transferred start is as good as the random one is in the end, null if
    it never is; saved: the share of the steps that this spares.

    Raises:
      UserError: no source dictionary can be transferred, or see ``train_from``.
    """
    refuse_transcoders(config, "Starting from another model's dictionaries")
    rows: list[dict] = []
    for target in store.models:
        into = [place for place in places(config, store) if place[1] == target]
        starts = {place: _start(place, config, store, work) for place in into}
        starts = {place: start for place, start in starts.items() if start is not None}
        if starts:
            directory = work.dictionaries / "transfer" / target
            rows += _compared(starts, config, store, directory)
    if not rows:
        raise UserError(
            "No dictionary of this run can be transferred: all are imported ones; leave "
            "sae.sources empty and train_saes again."
        )
    write_jsonl(work.result("dictionary_training.jsonl"), rows)
    return rows


def _member(place: Place, config: Config) -> Member:
    """The dictionary of seed 0 that maps speak about."""
    _, target, _, site = place
    return members(config.sae, [(target, site)])[0]


def _start(place: Place, config: Config, store: Store, work: Workdir) -> Dictionary | None:
    train, validation = (maps.load_pairs(store, *place, s, work) for s in ("train", "validation"))
    a = train.source.dictionary
    if not is_ours(a):
        return None
    stitch = fit_stitch(Problem("stitch", train, validation), config)
    scale = activation_scale(train.target.x)
    ways = {"to_source": stitch.back, "to_target": stitch.there}
    return with_unit_rows(transferred(a, **ways, scale=scale))


def _compared(
    starts: dict[Place, Dictionary], config: Config, store: Store, directory: Path
) -> list[dict[str, Any]]:
    """The rows of one target: each pair of sites from random parameters and from the given."""
    wide = [(_member(place, config), start) for place, start in starts.items()]
    group = [member for member, _ in wide for _ in range(2)]
    both = [start for _, given in wide for start in (None, given)]
    finished = train_from(config, store, group, both, directory=directory)
    log = read_jsonl(directory / "metrics.jsonl")
    error = next(name for name in ERRORS if name in log[0])
    steps = [row["step"] + 1 for row in log]
    rows = []
    for i, place in enumerate(starts):
        curves = {
            name: [row[error][2 * i + j] for row in log]
            for j, name in enumerate(("random", "transferred"))
        }
        fvus = [_fvu(d, place, config, store) for d in finished[2 * i : 2 * i + 2]]
        rows.append(_row(place, error, steps, curves, fvus))
    return rows


def _row(place: Place, error: str, steps: list[int], curves: dict, fvus: list[float]) -> dict:
    source, target, site_source, site_target = place
    reached = first_reached(curves["transferred"], curves["random"][-1])
    return {
        "source": source,
        "target": target,
        "site_source": str(site_source),
        "site_target": str(site_target),
        "error": error,
        "steps": steps,
        **curves,
        "fvu_random": fvus[0],
        "fvu_transferred": fvus[1],
        "steps_to_reach": None if reached is None else steps[reached],
        "saved": None if reached is None else 1 - steps[reached] / steps[-1],
    }


def first_reached(curve: list[float], goal: float) -> int | None:
    """Returns the first place at which a curve is at or below the goal, None if it never is."""
    below = np.flatnonzero(np.asarray(curve) <= goal)
    return int(below[0]) if len(below) else None


def _fvu(d: Dictionary, place: Place, config: Config, store: Store) -> float:
    _, target, _, site = place
    x = store.read(target, site, store.select("test")).astype(np.float32)
    mean = store.read(target, site, store.select("train")).mean(axis=0, dtype=np.float64)
    x_hat = modules.over_rows(d, x, method="__call__", size=config.evaluation.batch_size)
    variance = np.square(x - mean.astype(np.float32)[None, :]).sum(dtype=np.float64)
    return float(np.square(x - x_hat).sum(dtype=np.float64) / variance)

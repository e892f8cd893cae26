"""Rows that no map may be fitted on: of other texts, of unequal number, not finite."""

import dataclasses

import numpy as np
import pytest
from map_problems import ROWS, fit_one, make_problem, shuffled_problem

from crossdict_jax import maps
from crossdict_jax.errors import UserError
from crossdict_jax.maps import Pairs


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    return make_problem(*(rng.normal(size=(sum(ROWS.values()), d)) for d in (5, 4)))[0]


def keyed(pairs: Pairs, shift: int) -> Pairs:
    keys = np.stack([pairs.documents, np.arange(len(pairs))], axis=1)
    source = dataclasses.replace(pairs.source, keys=keys)
    target = dataclasses.replace(pairs.target, keys=keys + [[0, shift]])
    return Pairs(source, target, pairs.documents)


def test_pairs_of_other_places_are_refused(problem):
    same = keyed(problem.train, 0)
    assert len(same) == len(problem.train)
    with pytest.raises(UserError, match="Row 0 is document 0, byte 0 in the source and"):
        keyed(problem.train, 1)
    one = same.target.keys.copy()
    one[40] = 7, 3
    with pytest.raises(UserError, match=r"Row 40 is document 2, byte 40 .* document 7, byte 3 in"):
        Pairs(same.source, dataclasses.replace(same.target, keys=one), same.documents)


def test_shuffled_pairs_are_not_taken_for_a_mistake(problem):
    moved = maps.shuffled(keyed(problem.train, 0), 0)
    assert moved.target.keys is None
    some = keyed(problem.train, 0).source.take(np.array([3, 9]))
    np.testing.assert_array_equal(some.keys, [[0, 3], [0, 9]])


@pytest.mark.parametrize("short", ["source", "target", "documents"])
def test_unequal_numbers_of_rows_are_refused(problem, short):
    parts = dict(vars(problem.train))
    part = parts[short]
    parts[short] = part[:99] if short == "documents" else part.take(np.arange(99))
    with pytest.raises(UserError, match=r"Pairs need equally many rows: .*take both sides from"):
        Pairs(**{name: parts[name] for name in ("source", "target", "documents")})


@pytest.mark.parametrize("kind", maps.map_kinds())
def test_a_row_that_is_not_finite_is_named(problem, kind, tmp_path):
    x = problem.train.target.x.copy()
    x[57, 2] = np.nan
    target = dataclasses.replace(problem.train.target, x=x)
    bad = dataclasses.replace(problem, train=dataclasses.replace(problem.train, target=target))
    message = r"row 57 of the target's train rows \(document 2\) holds NaN or infinity"
    for one in (bad, shuffled_problem(bad)):
        with pytest.raises(UserError, match=message):
            fit_one(kind, one, tmp_path)

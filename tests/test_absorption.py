"""Feature absorption: the measure by hand, and on dictionaries trained on planted hierarchies."""

import numpy as np
import pytest
from test_dictionaries import leaves, on_one_device, stored_rows
from tiny_run import Config

from crossdict_jax import dictionaries
from crossdict_jax.config import SAEConfig
from crossdict_jax.dictionaries.train import train_dictionaries
from crossdict_jax.evaluation.absorption import absorption
from crossdict_jax.models import Site
from crossdict_jax.verify.planted import PlantedConfig, best_cosines, views
from crossdict_jax.workdir import Workdir

HIERARCHY = PlantedConfig(
    rows=16_384, features=32, widths=(24,), exclusive=0, active=3.0, zipf=0.5, children=8
)


def test_absorption_counts_the_silence_of_parents():
    directions = np.eye(3, dtype=np.float32)  # 0: parent of 1; 2: nobody's
    codes = np.asarray([[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1.0]])
    f = np.asarray([[0, 2, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1.0]])
    planted = {"codes": codes, "directions": directions, "parent": np.asarray([-1, 0, -1])}
    found = absorption(f, 3 * directions, **planted)
    assert found["children"].tolist() == [1] and not found["same_latent"][0]
    assert found["rate"][0] == 0.5 and found["rate_alone"][0] == 0.5
    merged = absorption(f, directions[[0, 0, 2]] + directions[[1, 1, 2]], **planted)
    assert merged["same_latent"][0]
    nobody = absorption(f[4:], directions, **planted | {"codes": codes[4:]})
    assert np.isnan(nobody["rate"][0])


def test_the_truth_itself_absorbs_nothing():
    planted = views(HIERARCHY, seed=1)
    truth = {"codes": planted.codes, "directions": planted.directions[0]}
    found = absorption(planted.codes, planted.directions[0], parent=planted.truth.parent, **truth)
    assert len(found["children"]) == 8 and (found["rate"] == 0).all()


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        yield measured_rates(tmp_path_factory)


def measured_rates(tmp_path_factory):
    """Mean absorption beyond the misses elsewhere, per architecture, of planted hierarchies."""
    planted = views(HIERARCHY, seed=1)
    found = {}
    for architecture in ("topk", "batchtopk", "matryoshka"):
        sae = SAEConfig(architecture=architecture, width=64, k=3, steps=1200, batch_size=256)
        work = Workdir(tmp_path_factory.mktemp(architecture))
        train_dictionaries(Config(sae=sae), stored_rows(planted.x[0], sites=1), work)
        d = dictionaries.load(work.dictionary("planted", Site(0)))
        best, _ = best_cosines(leaves(work)["W_dec"], planted.directions[0])
        measured = absorption(
            np.asarray(d.encode(planted.x[0])),
            leaves(work)["W_dec"],
            codes=planted.codes,
            directions=planted.directions[0],
            parent=planted.truth.parent,
        )
        use = ~measured["same_latent"]
        excess = np.nanmean((measured["rate"] - measured["rate_alone"])[use])
        found[architecture] = {"excess": excess, "pairs": int(use.sum()), "cosine": best.mean()}
    return found


def test_nesting_absorbs_less(rates):
    assert all(r["pairs"] >= 4 for r in rates.values()), rates
    assert rates["batchtopk"]["excess"] > 0.1, rates  # there is something to prevent
    assert rates["matryoshka"]["excess"] < rates["batchtopk"]["excess"], rates

"""The report's sections on shared features and on layers: numbers, nulls, words."""

import itertools
import re

import pytest
import test_report
from test_report import MODELS, page_of, write_required

from crossdict_jax.report import shared
from crossdict_jax.report.results import Run
from crossdict_jax.report.tables import Table
from crossdict_jax.report.terminal import summary_table
from crossdict_jax.results import PAIR
from crossdict_jax.results import SIMILARITY as MEASURES
from crossdict_jax.workdir import write_jsonl

FUNNEL = "From live features to confirmed pairs (mutual best): matched on 21,000 training rows"


def sites(layer, other=None) -> dict:
    ends = (*MODELS, f"resid_pre.{layer}", f"resid_pre.{layer if other is None else other}")
    return dict(zip(PAIR, ends))


def matching_rows(layer, confirmed, by_luck=0) -> list[dict]:
    common = {"method": "mutual_best", "minimum_firings": 30, "fdr": 0.05, "minimum_r": 0.3}
    common |= {"n_rows_train": 21000, "n_rows_test": 8500, "null": by_luck}
    common |= {"width_source": 512, "width_target": 600, "live_source": 400, "live_target": 500}
    r = {"r_train": 0.51, "r_test": 0.49, "r_token": 0.33, "r_test_confirmed": 0.62}
    aligned = {"matched": 210, "significant": 208, "strong": 150, "confirmed": confirmed}
    shuffled = {"matched": 99, "significant": 7, "strong": 5, "confirmed": by_luck}
    return [
        sites(layer) | {"pairing": "aligned"} | common | aligned | r,
        sites(layer) | {"pairing": "shuffled"} | common | shuffled | dict.fromkeys(r),
    ]


def similarity_rows(layers=4) -> list[dict]:
    rows, null = [], {"kind": "layers", "n_rows": 2000} | {f"{m}_null": -0.001 for m in MEASURES}
    for i, j in itertools.product(range(layers), repeat=2):
        alike = dict.fromkeys(MEASURES, round(0.9 - 0.2 * abs(i - j), 3))
        rows.append(null | sites(i, j) | alike)
    pair = {"source": MODELS[0], "target": MODELS[1]}
    rows.append({"kind": "proposal", **pair, "layer_pairs": "2:3", "cka": 0.8, "cka_of_run": 0.7})
    scores = {m: 0.44 for m in MEASURES} | {f"{m}_null": 0.11 for m in MEASURES}
    scores |= {f"{m}_p": 0.05 for m in MEASURES}
    rows.append({"kind": "decoders", **sites(2), "n_features": 77, **scores})
    rows.append({"kind": "decoders", **sites(3), "n_features": 4, **dict.fromkeys(scores)})
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    work = write_required(tmp_path_factory.mktemp("shared"), layers=(2, 3))
    write_jsonl(work.result("matching.jsonl"), matching_rows(2, 77) + matching_rows(3, 100, 3))
    write_jsonl(work.result("similarity.jsonl"), similarity_rows())
    return work


html, page = test_report.html, test_report.page  # of that run


def test_funnel_answer_and_decoders_are_shown_with_their_nulls_beside_them(page):
    def cells_of(start):
        table = next(t for caption, t in page.tables.items() if caption.startswith(start))
        return [[" ".join(cell.split()) for cell in row] for row in table]

    _, _, cells = cells_of(FUNNEL)
    assert cells[:3] == ["docs-gpt2 ↔ docs-neox, resid_pre.3", "400", "500"]
    assert cells[3:8] == ["210 × 99", "208 × 7", "150 × 5", "100 × 3", "25 % × 1 %"]
    assert cells[8] == "0.510 × –"
    _, some, few = cells_of("Decoder directions")
    assert some[1:] == ["77", *["0.44 p 0.05 × 0.11"] * 4] and few[1:] == ["4", *["– p – × –"] * 4]
    assert (
        "At resid_pre.3, with the highest count, 100 features of docs-gpt2 have a partner in "
        "docs-neox that held-out text confirms beyond the token, 25 % of those that could "
        "(shuffled pairs: 3); their mean correlation is 0.62." in page.text.replace("\u00a0", " ")
    )


def test_no_more_than_luck_is_called_a_negative_result(tmp_path):
    work = write_required(tmp_path, layers=(2,))
    write_jsonl(work.result("matching.jsonl"), matching_rows(2, 3, 3))
    text = page_of(work).text
    assert "Negative result: held-out text confirms no more one-to-one pairs" in text
    assert "(3 against 3)" in text


def test_every_measure_has_its_heat_map_in_words(html, page):
    maps = re.findall(r'aria-label="([^"]* of every layer of docs-gpt2 [^"]*)"', html)
    assert [words.split(" of every")[0] for words in maps] == ["CKA", "SVCCA", "RSA", "mutual kNN"]
    assert all("highest 0.90 at resid_pre.0; shuffled rows 0.00 on average" in w for w in maps)


def test_matches_without_a_test_are_neither_confirmed_nor_refuted(tmp_path, capsys):
    work = write_required(tmp_path, layers=(2,))
    write_jsonl(work.result("matching.jsonl"), matching_rows(2, None, None))
    summary_table(work)
    assert "Matched features could not be put to the test" in capsys.readouterr().out


def test_proposed_layers_can_be_copied(page, run, capsys):
    assert "--config.layer_pairs=2:3" in page.text
    assert "have a mean CKA of 0.80; those of this run 0.70" in page.text
    summary_table(run)
    out = " ".join(capsys.readouterr().out.split())
    assert "0.80 (this run's 0.70): --config.layer_pairs=2:3" in out
    assert "At resid_pre.3, with the highest count, 100 features of docs-gpt2 have" in out


def crosscoder_row(pairing, model, shared=0.4) -> dict:
    row = dict.fromkeys(("fvu", "fvu_alone", "fvu_from_others", "l0", "dead_fraction"), 0.2)
    row |= {"sites": "resid_pre.1 resid_pre.2", "pairing": pairing, "model": model, "site": model}
    row |= {"shared": shared, "exclusive": 0.3, "shared_confirmed": 1.0, "exclusive_refuted": None}
    return row


@pytest.mark.parametrize("by_luck, notes", [(0.4, 1), (0.1, 0)])
def test_crosscoders_show_every_row_and_what_shuffled_ones_invent(by_luck, notes):
    rows = [crosscoder_row("aligned", m) for m in "ab"]
    rows += [crosscoder_row("shuffled", m, by_luck) for m in "ab"]
    blocks = list(shared.crosscoder_section(Run({}, {}, [], {"crosscoder": rows})))
    (table,) = (block for block in blocks if isinstance(block, Table))
    assert table.caption == "One code of all models, resid_pre.1, resid_pre.2"
    heads = [row[0].text + row[1].text for row in table.rows]
    assert heads == ["aaligned", "baligned", "ashuffled", "bshuffled"]
    assert table.rows[0][7].text == "40\u00a0%"
    cautions = [block for block in blocks[1:] if isinstance(block, str)]
    assert len(cautions) == notes and all("40\u00a0% of the latents" in c for c in cautions)

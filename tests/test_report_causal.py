"""The report's section about single features: dose curves, verdicts, tokens, the sentence."""

import test_report
from test_report import bounded

from crossdict_jax.config import Config
from crossdict_jax.report import causal
from crossdict_jax.report.blocks import Details, Heading, Panels
from crossdict_jax.report.page import write_report
from crossdict_jax.report.results import Run
from crossdict_jax.results import PAIR
from crossdict_jax.workdir import write_jsonl

WHERE = dict(zip(PAIR, ("gpt", "neox", "resid_pre.6", "resid_pre.6")))


def row(feature, direction, *, transfers):
    effect = 1.0 if transfers else 0.05
    controls = {"random": 0.01, "random_low": -0.05, "random_high": 0.07, "shuffled": 0.02}
    scores = {"specific_random": effect - 0.01, "specific_shuffled": effect - 0.02}
    tokens = {"promoted_source": [" the", "\n", "<b>"], "promoted_target": [" the", "\n"]}
    return {
        **WHERE | tokens | bounded(0.1, ablation_r=0.7, effect=effect, **scores),
        **{"direction": direction, "feature": feature, "match": 40 + feature, "match_r": 0.5},
        **{"kl": 0.25, "q": 0.01 if transfers else 0.6, "transfers": transfers},
        **{"ablation_r_shuffled": 0.03},
        "doses": [{"alpha": a, "effect": a * effect} | controls for a in (0.1, 0.5)],
    }


def summary(direction, hits):
    counts = dict.fromkeys(("n_features", "n_scored", "n_ablation"), 2)
    counts |= {"n_transferring": hits, "of_match": 1.5}
    return {
        **WHERE | counts | {"direction": direction},
        **bounded(0.1, share_transferring=hits / 2, effect=0.5, specific_random=0.4 + hits),
        **bounded(0.1, specific_shuffled=0.3, specific_random_at_kl=0.6, kl=0.25),
        **bounded(0.1, ablation_r=0.7, ablation_r_shuffled=0.02),
    }


ROWS = [row(f, i, transfers=i == "ridge" and f == 7) for i in ("ridge", "match") for f in (3, 7)]
SUMMARY = [summary("ridge", 1), summary("match", 0)]


def run_of(rows, over) -> Run:
    return Run({}, {}, [], {"feature_causal": rows, "feature_causal_summary": over})


def blocks(rows, over, kind) -> list:
    section = causal.feature_causal_section(run_of(rows, over))
    return [block for block in section if isinstance(block, kind)]


def test_every_direction_has_its_curves_and_tables():
    assert blocks(ROWS, SUMMARY, Heading) == ["gpt → neox, resid_pre.6"]
    (panels,) = blocks(ROWS, SUMMARY, Panels)
    assert len(panels.figures) == 2
    ridge, match = (block.blocks[0] for block in blocks(ROWS, SUMMARY, Details))
    assert [len(t.rows) for t in (ridge, match)] == [2, 2]
    back = [dict(s, source="neox", target="gpt") for s in SUMMARY]
    assert len(blocks(ROWS, SUMMARY + back, Heading)) == 2


def test_the_table_puts_what_transfers_first_and_the_figure_says_what_it_draws():
    first, second = causal.features_table(ROWS[:2]).rows
    assert [(r[0].text, r[0].style) for r in (first, second)] == [("7", "strong"), ("3", "none")]
    assert first[1].text == "␣the · ⏎ · <b>"
    assert first[3].text == "1.000" and first[3].note == "[0.900, 1.100]"
    figure = causal.dose_figure(ROWS[:2])
    assert "ridge, gpt to neox: 0.10: 0.05, 0.50: 0.26" in figure.words  # means of both features
    assert "random directions at the largest dose 0.01" in figure.words
    assert figure.svg.startswith("<svg")


def test_the_sentence_counts_and_admits():
    sentence = causal.answer(run_of([], SUMMARY))
    assert sentence.startswith("Put into neox, the directions to which ridge maps 1 of 2 tested")
    assert sentence.endswith("the target’s best matching features: 0 of 2.")
    nothing = causal.answer(run_of([], [summary("ridge", 0)]))
    assert nothing.startswith("Negative result: put into neox")
    assert causal.answer(run_of([], [])) == ""


def test_the_page_shows_it_or_says_what_is_missing(tmp_path):
    work = test_report.write_required(tmp_path / "run", layers=(6,))
    head, missing = '<section id="features-put-to-work">', "feature_causal.jsonl, feature_causal_s"
    page = write_report(Config(models=("a", "b")), work).read_text()
    assert head not in page and missing in page
    write_jsonl(work.result("feature_causal.jsonl"), ROWS)
    write_jsonl(work.result("feature_causal_summary.jsonl"), SUMMARY)
    page = write_report(Config(models=("a", "b")), work).read_text()
    assert "gpt → neox" in page[page.index(head) :] and missing not in page
    assert "<b>" not in page  # a token is text, not markup

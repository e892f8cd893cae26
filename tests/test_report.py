"""The report: every row is shown, nothing is fetched, and a negative result is called one."""

import itertools
import operator
import re
from xml.etree import ElementTree

import pytest
from tiny_run import refused

from crossdict_jax.config import Config, settings
from crossdict_jax.report import answer, inputs, plots, transfer
from crossdict_jax.report.docs import write_docs
from crossdict_jax.report.page import write_report
from crossdict_jax.report.results import WRITTEN_BY, comparisons, read_run, stitchings
from crossdict_jax.report.tables import number
from crossdict_jax.report.terminal import summary_table
from crossdict_jax.results import BEATS_MEAN, BEATS_TOKEN, NO_BETTER, PAIR
from crossdict_jax.workdir import Workdir, write_json, write_jsonl

MODELS = ("docs-gpt2", "docs-neox")
R2 = {"mean": -0.002, "token": 0.46, "token_target": 0.5, "procrustes": 0.31, "ridge": 0.43}
R2 |= {"token_ridge": 0.58, "mlp": 0.49}
DOCUMENTS = {"train": 699, "validation": 100, "test": 201}
PAIRING = {
    "texts": 1000,
    "models": {"docs-gpt2": {"ends": 34000, "coverage": 0.941}},
    "rows": {"train": 21762, "validation": 2100, "test": 8500},
    "text": {"documents": DOCUMENTS, "bytes": DOCUMENTS},
}
HISTOGRAM = {"edges": [-5, -3, -1, 0], "counts": [10, 300, 40]}


def bounded(half=0.012, **scores) -> dict:
    ends = (("", 0), ("_low", -half), ("_high", half))
    return {f"{key}{end}": value + x for key, value in scores.items() for end, x in ends}


def transfer_row(kind, pairing, pair, r2) -> dict:
    positive, shuffled = max(r2, 0), pairing == "shuffled"
    better = BEATS_TOKEN if r2 > 0.46 else BEATS_MEAN
    return {
        **dict(zip(PAIR, pair)),
        **{"map": kind, "pairing": pairing, "n_rows": 8500, "n_documents": 201, "pool": 8192},
        **bounded(r2=r2, cosine=0.61 + 0.3 * positive, cosine_centered=positive),
        **bounded(top1=1 / 8192 if shuffled else 0.6 * positive),
        **bounded(feature_correlation=0.9 * positive),
        **bounded(context_gain=r2 - 0.3 if r2 > 0.3 else -0.004, mean_rank=4096.5 * (1 - positive)),
        **{"fvu": 1 - r2, "cosine_mean_predictor": 0.612, "sparsity_similarity": 0.4 * positive},
        **{"l0_source": 32.0, "l0_target": 31.7, "l0_predicted": 28.4},
        "verdict": NO_BETTER if r2 < 0.1 else better,
    }


def transfer_rows(*, scale: float = 1.0, models=MODELS, layers=(5, 6, 7)) -> list[dict]:
    rows = []
    for models_of, layer in itertools.product(itertools.permutations(models, 2), layers):
        pair = (*models_of, f"resid_pre.{layer}", f"resid_pre.{layer}")
        for kind, r2 in R2.items():
            score = r2 * scale + 0.01 * (layer - 6) + 0.02 * (models_of != tuple(models))
            rows.append(transfer_row(kind, "aligned", pair, score))
            rows.append(transfer_row(kind, "shuffled", pair, -0.021))
    return rows


def reconstruction_rows(models=MODELS, layers=(5, 6, 7)) -> list[dict]:
    losses = {"ce_clean": 4.654, "ce_zero": 9.812, "ce_mean": 6.644, "ce_sae": 4.831}
    quality = {"seed": 0, "member": "seed-0", "l0": 31.9, "fvu": 0.23, "dead_fraction": 0.043}
    quality |= losses | bounded(loss_recovered=0.964)
    ends, sites = itertools.product(models, layers), {n: f"resid_pre.{n}" for n in layers}
    return [dict(quality, model=m, site=sites[n], site_output=sites[n]) for m, n in ends]


def single_feature_rows() -> list[dict]:
    """Two single features and two bins of one direction."""
    start = dict(zip(PAIR, (*MODELS, "resid_pre.6", "resid_pre.6")))
    start |= {"map": "ridge", "pairing": "aligned"}
    context = {"before": "in the ", "token": "list\n", "after": " of", "activation": 2.0}
    feature = start | {"row": "feature", "r2": 0.9, "r2_validation": 0.8, "correlation": 0.95}
    feature |= {"token_share": 0.4, "firings": 50, "frequency": 0.02, "contexts": [context] * 2}
    feature |= {"match": {"feature": 3, "correlation": 0.7}}
    drivers = [{"feature": 3, "effect": 0.8}, {"feature": 1, "effect": -0.2}]
    driven = {"map": "mlp", "drivers": drivers, "exact": True, "stability": 0.91}
    undriven = {"map": "mlp", "drivers": [], "exact": None, "stability": None}
    share = start | {"row": "token_share", "high": 0.25, "r2_median": 0.5}
    return [
        feature | {"feature": 7, "rank": "most", "attributions": [driven]},
        feature | {"feature": 9, "rank": "least", "attributions": [undriven]},
        *(share | {"low": low} for low in (None, 0)),
    ]


def causal_row(value: float, **where) -> dict:
    row = dict.fromkeys(("control", "source", "site_source", "map", "pairing", "stitch_kind"))
    row |= where | {"site_edited": where["site_target"], "n_positions": 4000, "n_documents": 64}
    return row | {"ce": 9.8 - 5 * value, "kl": 5 - 5 * value} | bounded(0.02, loss_recovered=value)


def causal_rows(transfer: list[dict]) -> list[dict]:
    """Controls of every target and site, and every map stitched in each way it can be."""
    controls = {"clean": 1.0, "zero": 0.0, "mean": 0.55, "own_sae": 0.96}
    rows = []
    for target, site in sorted({(r["target"], r["site_target"]) for r in transfer}):
        where = {"target": target, "site_target": site}
        rows += [causal_row(value, **where, control=name) for name, value in controls.items()]
    for row in transfer:
        value = 0.55 + 0.45 * max(row["r2"], 0) - 0.2 * (row["pairing"] == "shuffled")
        where = {k: row[k] for k in (*PAIR, "map", "pairing")}
        if row["map"] in ("procrustes", "ridge", "token_ridge"):
            rows.append(causal_row(value + 0.02, **where, stitch_kind="activation"))
        if row["map"] != "token_target":
            rows.append(causal_row(value, **where, stitch_kind="features"))
    return rows


def write_curves(folder, labels: list[str]) -> None:
    write_json(folder / "members.json", [{"label": label} for label in labels])
    rows = [{"step": s, "loss": [1 + i + 10 / s for i, _ in enumerate(labels)]} for s in (49, 99)]
    write_jsonl(folder / "metrics.jsonl", rows)


def write_required(root, *, models=MODELS, layers=(5, 6, 7), scale=1.0) -> Workdir:
    work = Workdir(root)
    write_json(work.result("pairing.json"), PAIRING)
    write_jsonl(work.result("reconstruction.jsonl"), reconstruction_rows(models, layers))
    rows = transfer_rows(scale=scale, models=models, layers=layers)
    write_jsonl(work.result("transfer.jsonl"), rows)
    return work


def write_run(root) -> Workdir:
    """A whole run of two models at three layers, but for controls and matching."""
    work = write_required(root)
    write_jsonl(work.result("causal.jsonl"), causal_rows(transfer_rows()))
    names = ("log10_frequency_histogram", "decoder_cosine_histogram")
    where, quality = ("model", "site", "seed", "member"), reconstruction_rows()
    features = [{k: r[k] for k in where} | dict.fromkeys(names, HISTOGRAM) for r in quality]
    write_jsonl(work.result("features.jsonl"), features)
    labels = [f"{row['model']} {row['site']}" for row in features]
    write_curves(work.dictionaries / "training" / "d128", labels)
    write_curves(work.maps / "training" / "mlp", [*labels, *(f"{x} shuffled" for x in labels)])
    work.record_timing("train_saes", wall_s=55.9, rows_per_s=91000.0, device="cpu", devices=1)
    return work


class Page:
    """The tables, the words and the addresses of a page, whose tags all close."""

    def __init__(self, html: str):
        root = ElementTree.fromstring(re.sub(r"<!doctype html>|<meta[^>]*>", "", html))
        root.find(".//style").text = ""
        self.tags = {element.tag for element in root.iter()}
        self.ids = [e.get("id") for e in root.iter() if e.get("id")]
        self.addresses = [e.get(k) for e in root.iter() for k in ("href", "src") if e.get(k)]
        self.text = " ".join(" ".join(root.itertext()).split())
        self.tables = {}
        for table in root.iter("table"):
            rows = [[" ".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
            self.tables[table.findtext("caption")] = rows


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Workdir:
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def html(run) -> str:
    return html_of(run)


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def html_of(work) -> str:
    return write_report(Config(models=MODELS), work).read_text(encoding="utf-8")


def page_of(work) -> Page:
    return Page(html_of(work))


def test_every_transfer_row_is_shown_with_its_null_beside_it(run, page):
    rows = read_run(run).rows["transfer"]
    words = {"ridge": BEATS_MEAN, "token_ridge": BEATS_TOKEN, "token": "baseline"}
    for row in [r for r in rows if r["pairing"] == "aligned"]:
        name = f"{row['source']} → {row['target']}, {row['site_source']}"
        shown = next(t for caption, t in page.tables.items() if caption.startswith(name + ":"))
        cells = next(cells for cells in shown if cells[0].split()[0] == row["map"])
        low, high = number(row["r2_low"]), number(row["r2_high"])
        assert cells[1].split() == [number(row["r2"]), f"[{low},", f"{high}]", "×", "−0.021"]
        assert number(row["cosine_mean_predictor"]) in cells[4]
        assert words.get(row["map"], "") in cells[0]
    stitched = next(t for caption, t in page.tables.items() if caption.startswith("Loss recovered"))
    groups = stitchings(read_run(run).rows["causal"])
    assert len(stitched) == 1 + sum(len(group.lines) + len(group.references) for group in groups)
    assert len(page.tables["Every dictionary on held-out text"]) == 1 + 6


def test_the_page_needs_no_other_file_and_figures_have_words_and_colours(html, page):
    assert all(address.startswith("#") for address in page.addresses)
    assert {a[1:] for a in page.addresses} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert len(html) < 3_000_000
    # densities, cosines; r2, stitching of each direction and layer; curves
    figures = 12 + 2 * 6 + 2
    assert html.count("<svg") == html.count('role="img" aria-label="') == figures
    assert "Lines: the mean (R² 0)" in page.text
    style, drawings = html.split("</style>", 1)
    assert not re.search(r"(fill|stroke): ?#|font-family", drawings)
    used = set(re.findall(r"var\((--[\w-]+)\)", html)) - {"--prose", "--plain", "--code", "--least"}
    assert all(f"{name}: light-dark(" in style for name in used)


def test_the_answer_is_made_from_the_numbers(page):
    assert "From docs-gpt2 to docs-neox the best map, token_ridge at resid_pre.7" in page.text
    assert "12 of 24 fitted maps beat the table of token means (12 beat the mean only)" in page.text
    assert "token_ridge of docs-neox resid_pre.7 put into docs-gpt2 resid_pre.7" in page.text
    assert "recovers 84.5 % [82.5 %, 86.5 %] of the loss that zeroing costs; its feat" in page.text
    assert "more than the table of token means (77.1 %); beside it the target’s own" in page.text
    assert "Negative result" not in page.text


def test_every_setting_is_shown_as_it_is_typed():
    config = Config(models=("a b", "c"), layers=(5,), layer_pairs="5:6", seed=3)
    config.sae.learning_rate = (1e-3, 2e-3)
    shown = dict(inputs.settings(config))
    kinds = settings.settings(Config)
    parsed = {name: settings.parse(kinds[name].type, text) for name, text in shown.items()}
    assert parsed == {name: operator.attrgetter(name)(config) for name in kinds}


def test_the_terminal_table_fits_a_screen(run, tmp_path, capsys):
    summary_table(run)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 30 and max(map(len, lines[:-1])) <= 120  # the last names a folder
    out = "\n".join(lines)
    assert out.count("resid_pre.") == 6
    assert re.search(r"0.460 +0.580 token_ridge ● +0.490 mlp ● +−0.021", out)
    assert "results.md" in lines[-1]
    # Of many layer pairs each direction's best one.
    summary_table(write_required(tmp_path, models=("a", "b", "c"), layers=range(12)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 30 and "\n".join(lines).count("resid_pre.11") == 6


def test_the_documentation_is_filled_from_a_run(run, tmp_path):
    docs = tmp_path / "crossdict_jax/docs"
    docs.mkdir(parents=True)
    block = "<!-- generated: {} -->\nold\n<!-- end -->\nkept\n"
    (tmp_path / "README.md").write_text(block.format("result"))
    (docs / "verification.md").write_text(block.format("gates"))
    (docs / "models.md").write_text(block.format("models"))
    paths = write_docs(run, tmp_path)
    assert {path.name for path in paths} >= {"README.md", "results.md", "transfer.svg"}
    text = (tmp_path / "README.md").read_text()
    assert "| 0.580 token_ridge ●" in text and "old" not in text and text.endswith("kept\n")
    assert "| docs-neox | 8 layers of 128" in (docs / "models.md").read_text()
    assert "old" in (docs / "verification.md").read_text()  # no gates beside this run
    svg = (docs / "transfer.svg").read_text()
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "var(" not in svg


def test_what_is_missing_is_said(tmp_path):
    work = write_required(tmp_path, layers=(6,))
    html = html_of(work)
    text = Page(html).text
    for name in ("controls", "causal", "matching", "similarity", "features", "metrics"):
        assert f"{name}.jsonl" in text
    assert "timing.json" in text and "Which features" not in text
    assert "No causal test was run" in text and "--config=configs/stored.py:" in text
    assert html_of(work) == html


@pytest.mark.parametrize("name, stage", WRITTEN_BY.items())
def test_a_needed_file_that_is_missing_names_its_stage(tmp_path, name, stage):
    work = write_required(tmp_path)
    work.result(name).unlink()
    refused(f"{name} is missing; run python -m launch.{stage}", read_run, work)


def test_markup_is_shown_as_text(tmp_path):
    """In names of models, maps, folders and sources, in contexts, and in a study's title."""
    models, script = ('a<b>&"c', "$x_1$ -->"), "<script>alert(1)</script>"
    work = write_required(tmp_path / "<i>run", models=models, layers=(6,))
    rows = transfer_rows(models=models, layers=(6,))
    rows = [r | {"map": script} if r["map"] == "mlp" else r for r in rows]
    write_jsonl(work.result("transfer.jsonl"), rows)
    write_jsonl(work.result("causal.jsonl"), causal_rows(rows))
    contexts = {"contexts": [{"before": "<u>", "token": "<img src=x>", "after": "</u>"}]}
    single = [row | contexts for row in single_feature_rows()[:2]]
    write_jsonl(work.result("feature_transfer.jsonl"), single)
    config = Config(models=models)
    config.text.source, config.sae.sources = "<em>text", ("<i>folder", "train")
    path = write_report(config, work, sections=[("<title>", "<p>its own html</p>")])
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.tags & {"b", "i", "script", "u", "img", "em"}
    shown = ['What do a<b>&"c and $x_1$ --> share?', script, "· <i>run", "<em>text"]
    for words in (*shown, "<u>«<img src=x>»</u>", "<title>", "its own html", "<i>folder; topk"):
        assert words in page.text


def test_a_negative_result_is_called_one(tmp_path):
    said = {0.0: ["does not surely predict held-out features better than their mean"]}
    said[0.0] += ["Negative result: none of the 8 fitted maps beats the mean"]
    said[0.5] = ["none of the 8 fitted maps beats the table of token means"]
    said[0.5] += ["beyond the identity of the current token nothing is shown"]
    for scale, sentences in said.items():
        work = write_required(tmp_path / str(scale), layers=(6,), scale=scale)
        told = " ".join(dict(answer.answer(read_run(work))).values())
        assert all(words in told for words in sentences)


def test_the_best_stitch_is_the_one_that_wins_back_most_of_what_the_mean_costs():
    rows = causal_rows(transfer_rows(layers=(6,)))
    for row in rows:
        if row["control"] == "mean" and row["target"] == "docs-gpt2":
            row["loss_recovered"] = 0.84  # every map looks good against zero here
        row["site_edited"] = "mlp_out.6"  # of a transcoder
    sentence = answer.to_what_effect(stitchings(rows))
    assert "put into docs-neox mlp_out.6, recovers" in sentence
    assert sentence.replace("\u00a0", " ").endswith("of what the mean costs it wins back 62.4 %.")
    rows = [r | {"loss_recovered": 0.9} if r["pairing"] == "shuffled" else r for r in rows]
    assert answer.to_what_effect(stitchings(rows)).startswith("Negative result: even the best")
    rows = [row | {"loss_recovered_low": None} for row in rows]
    assert answer.to_what_effect(stitchings(rows)).startswith(
        "Without an interval nothing is shown"
    )


def test_layers_stitched_together_stand_apart(tmp_path):
    work = write_required(tmp_path, layers=(5, 6))
    rows = causal_rows(read_run(work).rows["transfer"])
    both = "resid_pre.5+resid_pre.6"
    several = {"sites": both.split("+"), "site_source": both, "site_target": both}
    together = [r | several for r in rows if r["site_target"] == "resid_pre.6"]
    write_jsonl(work.result("causal.jsonl"), rows + together)
    written = read_run(work).rows["causal"]
    assert stitchings(written) == stitchings(rows)
    first, _ = stitchings(written, together=True)
    assert first.sites == "resid_pre.5+6" and first.reference("mean") == 0.55
    text = page_of(work).text
    assert "docs-neox, resid_pre.5+6" in text and "Several layers at once" in text


def test_a_shuffled_map_that_beats_the_mean_is_a_warning(tmp_path):
    work = write_required(tmp_path)
    rows = transfer_rows()
    leak = next(r for r in rows if r["map"] == "ridge" and r["pairing"] == "shuffled")
    leak |= {"r2": 0.2, "verdict": BEATS_TOKEN}
    write_jsonl(work.result("transfer.jsonl"), rows)
    config = Config()
    config.sae.sources = ("folder", "train")
    leaks, ceiling = answer.cautions(read_run(work), config)
    assert "ridge still “beats token” (R² 0.200" in leaks and "(sae.sources)" in ceiling
    one = [row | {"n_documents": 1, "verdict": None} for row in transfer_rows()]
    write_jsonl(work.result("transfer.jsonl"), one)
    page = page_of(work).text
    assert "no verdict" in page and "No map was judged, as one" in page and "Only one held" in page
    few = [row | {"n_documents": 12} for row in transfer_rows()]
    write_jsonl(work.result("transfer.jsonl"), few)
    poor = [row | {"dead_fraction": 0.7, "fvu": 0.9} for row in reconstruction_rows(layers=(6,))]
    write_jsonl(work.result("reconstruction.jsonl"), poor)
    documents, dead, missed = answer.cautions(read_run(work), Config())
    assert "Only 12 held-out documents" in documents
    assert "2 of 2 dictionaries (docs-gpt2 resid_pre.6 seed-0" in dead
    assert "docs-neox resid_pre.6" in missed


def test_a_diverged_dictionary_is_a_warning_everywhere(tmp_path, capsys):
    work = write_required(tmp_path, layers=(5, 6))
    rows = reconstruction_rows(layers=(5, 6))
    rows[0] |= {"fvu": 812.5, "site_output": "mlp_out.5"}  # docs-gpt2 resid_pre.5
    write_jsonl(work.result("reconstruction.jsonl"), rows)
    page = page_of(work)
    assert "FVU is far above 1, so numbers mean nothing" in page.text
    first = page.tables["Every dictionary on held-out text"][1]
    assert "resid_pre.5 to mlp_out.5" in first
    assert "812.5 ⚠ far above 1" in " ".join(" ".join(first).split())
    summary_table(work)
    out = capsys.readouterr().out
    assert "⚠ dictionary with an FVU above 2" in " ".join(out.split()) and out.count("⚠ docs-") == 2


def test_undefined_numbers_are_dashes(tmp_path):
    work = write_required(tmp_path, layers=(6,))
    keep = {*PAIR, "map", "pairing", "r2", "verdict", "control", "stitch_kind"}
    rows = transfer_rows(layers=(6,))
    for name, file in (("transfer", rows), ("causal", causal_rows(rows))):
        blank = [{k: v if k in keep else None for k, v in row.items()} for row in file]
        write_jsonl(work.result(f"{name}.jsonl"), blank)
    page = page_of(work)
    assert "The causal test says nothing" in page.text
    assert "None" not in page.text and "nan" not in page.text


def test_controls_and_single_features_get_their_sections(tmp_path):
    work = write_required(tmp_path, layers=(6,))
    rows = [r | {"r2_normalized": 0.62} for r in transfer_rows(layers=(6,))]
    write_jsonl(work.result("transfer.jsonl"), rows)
    row = next(r for r in rows if (r["map"], r["pairing"]) == ("ridge", "aligned"))
    controls = [row | {"control": "ceiling", "r2": 0.71}]
    controls += [row | {"control": "untrained", "r2": 0.31, "context_gain": 0.017}]
    write_jsonl(work.result("controls.jsonl"), controls)
    write_jsonl(work.result("feature_transfer.jsonl"), single_feature_rows())
    page = page_of(work)
    title, ridge = page.tables["Controls, docs-gpt2 → docs-neox, resid_pre.6"]
    shown = dict(zip((t.split("  ")[0].strip() for t in title), (c.split()[0] for c in ridge)))
    assert shown["map"] == "ridge" and shown["R²"] == number(row["r2"])
    assert (shown["R², ceiling"], shown["R², re-initialised"]) == ("0.710", "0.310")
    assert any(c.split()[0] == "0.017" for c in ridge) and any("0.62" in c for c in ridge)
    caption = next(c for c in page.tables if c.startswith("Most and least transferable"))
    first, last = page.tables[caption][1:]
    assert "#7" in first[0] and "in the «list⏎» of" in first[5]
    assert "mlp: #3 0.80, #1 −0.20 (exact, stability 0.91)" in first[7]
    assert "least" in last[0] and last[7].strip() == "–"
    bins = page.tables["Features in bins of firing frequency and of token share"]
    assert len(bins) == 3 and bins[1][0] == "docs-gpt2 → docs-neox, resid_pre.6"


def test_far_below_zero_stays_on_the_axis():
    rows = transfer_rows(layers=(6,))
    low = [r | bounded(0.5, r2=-7.5) if r["map"] == "ridge" else r for r in rows]
    group = comparisons(low)[:1]
    low, _ = plots.score_limits(group[0].lines, "r2", -0.5, 0.1)
    assert -0.6 < low < 0 and "◂ −7.5" in transfer.r2_figure(group[0], group).svg

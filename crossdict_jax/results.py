"""Result files: their columns, what they mean, and how they are read and written.

A study adds its file to ``TABLES`` in the ``__init__.py`` of its folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

from crossdict_jax.errors import UserError
from crossdict_jax.workdir import (
    AGAIN,
    Workdir,
    file_digest,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)

# What a row of transfer.jsonl may say in its column "verdict".
BEATS_TOKEN = "beats token"
BEATS_MEAN = "beats mean, not token"
NO_BETTER = "no better than the mean"

PAIRINGS = ("aligned", "shuffled")
SIMILARITY = ("cka", "svcca", "rsa", "mutual_knn")
PAIR = ("source", "target", "site_source", "site_target")  # columns that name a layer pair
BASELINES = ("mean", "token", "token_target")  # maps that read no activations
LINEAR_MAPS = ("procrustes", "ridge", "ridge_codes", "low_rank", "token_ridge")
# The order in which maps are shown; kinds that are not named follow.
MAP_ORDER = (*BASELINES, *LINEAR_MAPS, "mlp", "token_mlp", "hypernetwork", "crosscoder")

SEALS = "checksums.json"  # {result file: its sha256}
TABLES: dict[str, Table] = {}  # by file, or pattern of files


@dataclass(frozen=True)
class Column:
    """One column of a result file."""

    name: str
    meaning: str
    unit: str = ""  # of its numbers; empty for shares, counts and texts
    values: tuple[str, ...] = ()  # the texts that it may hold; empty for any
    interval: bool = False  # whether NAME_low and NAME_high stand beside it

    @property
    def names(self) -> tuple[str, ...]:
        """The column and the ends of its interval, as in the file."""
        ends = ("", "_low", "_high") if self.interval else ("",)
        return tuple(self.name + end for end in ends)


@dataclass(frozen=True)
class Table:
    """A file of WORKDIR/results, or a pattern of files with ``*``: JSON lines."""

    file: str
    meaning: str  # of a row
    columns: tuple[Column, ...]

    def problem(self, rows: list[dict]) -> str | None:
        """Returns what rows hold that the table does not describe, or None."""
        columns = {name: column for column in self.columns for name in column.names}
        for key, value in (entry for row in rows for entry in row.items()):
            if key not in columns:
                return f"a column {key!r} that is not described"
            allowed = columns[key].values
            if allowed and value is not None and value not in allowed:
                return f"{key}={value!r}, where only {', '.join(allowed)} are described"
        return None


# Reading and writing


def write(work: Workdir, file: str, rows: list[dict]) -> None:
    """Writes a result file, whole or not at all; undefined numbers become null.

    Raises:
      ValueError: the file, or a column or value of a row, is not described in its table.
    """
    if problem := table_of(file).problem(rows):
        raise ValueError(f"{file} would hold {problem}; describe it where its table is.")
    write_jsonl(work.result(file), rows)
    seals = work.result(SEALS)
    known = read_json(seals) if seals.exists() else {}
    write_json(seals, known | {file: file_digest(work.result(file))})


def read(work: Workdir, file: str) -> list[dict]:
    """Returns the rows of a result file.

    Raises:
      UserError: it is missing, damaged or altered, or another version of this project wrote it.
      ValueError: no table describes the file.
    """
    path, table, seals = work.result(file), table_of(file), work.result(SEALS)
    rows = read_jsonl(path)
    if seals.exists() and read_json(seals).get(file) not in (None, file_digest(path)):
        raise UserError(f"{path} is altered or cut short (checksum mismatch); {AGAIN}.")
    if problem := table.problem(rows):
        raise UserError(f"{path} holds {problem}: another version wrote it; {AGAIN}.")
    return rows


def read_if_there(work: Workdir, file: str) -> list[dict]:
    """Returns the rows of a result file, none if its stage has not run."""
    return read(work, file) if work.result(file).exists() else []


def table_of(file: str) -> Table:
    """Returns the table that describes a file; ValueError if none does."""
    for pattern, table in TABLES.items():
        if fnmatch(file, pattern):
            return table
    raise ValueError(f"{file} is no result file; there are {', '.join(TABLES)}.")


def describe(file: str, meaning: str, /, *columns: Column, **meanings: str) -> Table:
    """Adds the table of a file, or of a pattern of files, to ``TABLES`` and returns it.

    ``meanings`` are columns without an interval, after the others.
    """
    TABLES[file] = Table(file, meaning, columns + plain(**meanings))
    return TABLES[file]


def read_matches(
    work: Workdir, source: str, target: str, site_source: str, site_target: str
) -> list[dict]:
    """Returns the rows of matches.jsonl of two dictionaries, in either order of the models.

    They lack the names of models and sites; feature_source is of the given source.

    Raises:
      UserError: matches.jsonl is missing or damaged.
    """
    pair = (source, target, str(site_source), str(site_target))
    swapped = (target, source, str(site_target), str(site_source))
    swap = {"feature_source": "feature_target", "feature_target": "feature_source"}
    matches = []
    for row in read(work, "matches.jsonl"):
        stored = tuple(row.pop(key) for key in PAIR)
        if stored == swapped != pair:
            row = {swap.get(key, key): value for key, value in row.items()}
        if stored in (pair, swapped):
            matches.append(row)
    return matches


# Rows in order


def map_order(kind: str) -> int:
    """Returns the position of a kind of map in tables and figures."""
    return MAP_ORDER.index(kind) if kind in MAP_ORDER else len(MAP_ORDER)


def pair_columns(pair) -> dict[str, str]:
    """Returns the columns that name a direction and its sites."""
    return {name: str(getattr(pair, name)) for name in PAIR}


def pair_of(row: dict) -> tuple:
    """Returns (source, target, site_source, site_target) of a row."""
    return tuple(row.get(key) for key in PAIR)


def grouped(rows: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Groups rows by the values of some columns, in the order in which these appear."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def by_pair(rows: Iterable[dict]) -> dict[tuple, list[dict]]:
    """Groups rows by layer pair, those of one direction together, else in order."""
    by_direction = grouped(rows, "source", "target").values()
    return {
        pair: of_pair for some in by_direction for pair, of_pair in grouped(some, *PAIR).items()
    }


def site_words(site_source: str, site_target: str) -> str:
    """Returns a pair of sites in words, once if both are the same; of several, resid_pre.5+6."""
    ends = (s.replace(f"+{s.partition('.')[0]}.", "+") for s in (site_source, site_target))
    return " → ".join(dict.fromkeys(ends))


def pair_words(row: dict, arrow: str = "→") -> str:
    """Returns the models and the sites of a row in words."""
    sites = site_words(row["site_source"], row["site_target"])
    return f"{row['source']} {arrow} {row['target']}, {sites}"


# Columns of several files


def plain(**meanings: str) -> tuple[Column, ...]:
    """Returns columns without an interval: name=meaning."""
    return tuple(Column(name, meaning) for name, meaning in meanings.items())


def intervals(unit: str = "", **meanings: str) -> tuple[Column, ...]:
    """Returns columns with an interval: name=meaning."""
    return tuple(Column(name, text, unit, interval=True) for name, text in meanings.items())


PAIR_COLUMNS = plain(
    source="the model that is read",
    target="the model whose features are predicted, or that is edited",
    site_source="where the source is read, such as resid_pre.6",
    site_target="where the target's features or activations are",
)
MAP = Column("map", "kind of map, such as ridge")
PAIRING = Column("pairing", "shuffled: fitted and scored on permuted rows", values=PAIRINGS)
DICTIONARY = plain(
    model="the model that is read",
    site="where it is read",
    site_output="what is reconstructed: the site, or what a transcoder predicts",
    seed="of the dictionary",
    member="folder of the dictionary",
)
COUNTS = plain(n_rows="held-out rows that are scored", n_documents="their documents")
POSITIONS = Column("n_positions", "text positions whose next token is scored")
SCORES = (
    *COUNTS,
    *plain(
        n_live="features of the target that are active in some held-out row and vary",
        pool="candidates of the retrieval",
        l0_source="active features per row of the source",
        r2_per_feature_median="R² of single live features, median",
        rate_correlation="correlation of predicted and true firing rates over features",
        n_context_rows="rows whose source token occurs in the training rows that give its mean",
    ),
    *intervals(
        fvu="share of the variance of the target's features, about the training mean, left over",
        r2="1 - fvu, over all rows and features at once; the mean predictor has about 0",
        cosine="mean cosine of predicted and true features of a row",
        cosine_mean_predictor="the same for the training mean in place of the prediction",
        cosine_centered="the same after the training mean is taken from both",
        top1="share of predictions whose own target is the nearest in the pool; chance 1 / pool",
        mean_rank="mean rank of the own target in the pool, from 1; chance (pool + 1) / 2; ties "
        "rank last, so a prediction of zeros does",
        feature_correlation="mean over live features of the correlation of predicted and true",
        l0_target="active features per row of the target",
        l0_predicted="active features per row of the prediction",
        sparsity_similarity="mean Jaccard index of predicted and true sets of active features",
        context_gain="R² after the mean for the source's token is taken from both sides",
    ),
    Column(
        "verdict",
        "by paired bootstrap differences to the baselines; null: one document has no interval",
        values=(BEATS_TOKEN, BEATS_MEAN, NO_BETTER),
    ),
    *intervals(
        **{
            f"{name}_normalized": f"{name}: 0 at shuffled pairs, 1 at the ceiling"
            for name in ("r2", "cosine_centered", "top1", "feature_correlation")
        }
    ),
)
DIRECTION = Column("direction", "kind of map that gave the direction; match: the target's feature")
ABLATION = (
    "correlation of what removing the feature and its mapped direction change; none where fewer "
    "than 5 contexts have the latter"
)
SPECIFIC = intervals(
    "nats",
    specific_random="effect above random directions of equal norm",
    specific_shuffled="effect above other features' mapped directions of equal norm",
    specific_random_at_kl="effect above random directions where all spend kl_budget",
    specific_shuffled_at_kl="effect above other features' mapped directions where all do",
)


# The files of the stages

describe(
    "reconstruction.jsonl",
    "one dictionary, on held-out text",
    *DICTIONARY,
    *COUNTS,
    POSITIONS,
    *intervals(
        l0="active features per row",
        fvu="share of the variance of the activations, about the training mean, left over",
    ),
    *intervals(
        "nats",
        ce_clean="cross-entropy of the next token with the model's own activations",
        ce_zero="with zeros in their place",
        ce_mean="with their training mean in their place",
        ce_sae="with the reconstruction in their place",
        kl_sae="KL divergence of the clean prediction to that with the reconstruction",
    ),
    *intervals(
        loss_recovered="(ce_zero - ce_sae) / (ce_zero - ce_clean); null: zeros cost < 0.05",
        loss_recovered_mean="the same with the mean in place of zeros",
        kl_recovered="1 - kl_sae / that of zeros; null: zeros cost < 0.05",
        kl_recovered_mean="the same with the mean in place of zeros",
    ),
    width="number of features",
    dead_fraction="share of features that fire in no kept row of training and test",
)
MAP_COLUMNS = (*PAIR_COLUMNS, MAP, PAIRING)
describe("transfer.jsonl", "one map at one layer pair, on held-out rows", *MAP_COLUMNS, *SCORES)
describe(
    "controls.jsonl",
    "a control of one map. ceiling: from a second dictionary seed of the target itself, or its own "
    "tokens; untrained: into the re-initialised target",
    Column("control", "which", values=("ceiling", "untrained")),
    *MAP_COLUMNS,
    *SCORES,
)
describe(
    "features.jsonl",
    "histograms over the features of one dictionary, or over those that one map predicts",
    *DICTIONARY,
    *MAP_COLUMNS,
    log10_frequency_histogram="of log10 of the share of rows that a feature fires on",
    decoder_cosine_histogram="of the cosine of a decoder row to the one most like it",
    correlation_by_frequency="of prediction and truth, in bins of firing frequency",
)
describe(
    "feature_transfer.jsonl",
    "one feature of the target that is predicted best or worst, or a bin of features by firing "
    "frequency or by how much their token explains",
    *MAP_COLUMNS,
    Column("row", "what it is about", values=("feature", "frequency", "token_share")),
    Column("rank", "which end of the ranking", values=("most", "least")),
    feature="its number in the target's dictionary",
    r2="of the feature, on test rows, by which it was chosen",
    r2_validation="on validation rows, which had no part in the choice",
    correlation="of prediction and truth",
    token_share="R² of the map from the target's own token",
    firings="test rows on which it fires",
    frequency="share of the test rows on which it fires",
    match="the source's feature that correlates best: its number and correlation",
    attributions="features of the source that drive it, by map",
    contexts="texts around its strongest firings",
    low="lower end of a bin; null: none",
    high="upper end of a bin",
    n_features="features in the bin",
    r2_median="their median R²",
)
describe(
    "matching.jsonl",
    "two dictionaries: features matched one to one, and what is left on held-out text",
    *PAIR_COLUMNS,
    PAIRING,
    Column("method", "of matching", values=("mutual_best", "hungarian")),
    width_source="features of the source",
    width_target="features of the target",
    live_source="of these, those with at least minimum_firings",
    live_target="of these, those with at least minimum_firings",
    matched="pairs by correlation on training rows",
    significant="of these, correlated beyond circular shifts on held-out rows at fdr; null, as "
    "what follows from it: no shift leaves all documents",
    strong="of these, correlated by at least minimum_r",
    confirmed="of these, correlated beyond shuffles among rows with equal tokens",
    fdr="false discovery rate",
    minimum_firings="on training rows",
    minimum_r="correlation that a strong match reaches",
    r_train="mean correlation of the matches on training rows",
    r_test="on held-out rows",
    r_token="mean of shuffles among rows with equal tokens",
    r_test_confirmed="r_test of the confirmed",
    null="confirmed on shuffled pairs",
    n_rows_train="rows on which features were matched",
    n_rows_test="rows on which matches were confirmed",
)
describe(
    "matches.jsonl",
    "one matched pair of features; a match has no direction",
    *PAIR_COLUMNS,
    feature_source="number in the source's dictionary",
    feature_target="number in the target's dictionary",
    confirmed="whether held-out text confirms it",
    r_train="correlation on training rows",
    r_test="on held-out rows",
    r_token="mean of shuffles among rows with equal tokens",
    beyond_token="whether it beats every shuffle among rows with equal tokens",
    p="share of circular shifts that correlate as much",
    p_adjusted="p by Benjamini and Hochberg",
)
describe(
    "similarity.jsonl",
    "how alike the activations of two layers are (layers), the layer pairs that these propose, "
    "or how alike the decoder directions of confirmed matches are (decoders)",
    Column("kind", "of row", values=("layers", "proposal", "decoders")),
    *PAIR_COLUMNS,
    cka="linear CKA, unbiased; 0 for independent rows",
    svcca="mean canonical correlation of the leading components",
    rsa="rank correlation of the distances between rows, of the first 500",
    mutual_knn="share of nearest neighbours that both have",
    **{f"{name}_null": "of shuffled rows or matchings, mean" for name in SIMILARITY},
    **{f"{name}_p": "share of random matchings that score as high" for name in SIMILARITY},
    n_rows="held-out rows that are compared",
    layer_pairs="of a proposal: the value of --config.layer_pairs",
    cka_of_run="mean CKA of the run's layer pairs",
    n_features="confirmed matches",
)
describe(
    "crosscoder.jsonl",
    "one model in a joint code of all models, trained on aligned or shuffled rows, or on the "
    "first model and a copy or a rotated copy of itself",
    Column("pairing", "what it was trained on", values=(*PAIRINGS, "self", "rotated")),
    *COUNTS,
    *intervals(
        fvu="share of the variance left over when all models are shown",
        fvu_alone="when this model alone is shown",
        fvu_from_others="when all others are shown",
        l0="active latents per row",
    ),
    sites="the site of every model",
    model="whose activations are reconstructed",
    site="its site",
    width="number of latents",
    variant="of the crosscoder",
    dead_fraction="share of latents that never fire",
    n_live="latents that fire",
    shared="share of live latents, each model's decoder norm a quarter of the largest",
    exclusive="share whose decoder norm is that large in this model alone",
    shared_confirmed="share of the shared that explain every model beyond shifts",
    exclusive_refuted="share of the exclusive that explain another model too",
    exclusive_missed="share of the exclusive that explain what is left of another model",
    relative_norms="histogram of this model's share of each latent's decoder norms",
)
describe(
    "causal.jsonl",
    "the target's prediction with its activations replaced at paired text positions, by what a "
    "map predicts (stitching) or by a control; at one layer pair or at several together",
    Column(
        "intervention",
        "what is done",
        values=("stitching", "control", "stitching_together", "control_together"),
    ),
    Column(
        "control",
        "no edit, zeros, the training mean, the target's own reconstruction",
        values=("clean", "zero", "mean", "own_sae"),
    ),
    *MAP_COLUMNS,
    Column(
        "stitch_kind",
        "the predicted activation, or the predicted features, decoded",
        values=("activation", "features"),
    ),
    POSITIONS,
    *intervals(
        "nats",
        ce="cross-entropy of the next token",
        kl="KL divergence of the target's own prediction to the edited one",
    ),
    *intervals(loss_recovered="(ce_zero - ce) / (ce_zero - ce_clean); null: zeros cost < 0.05"),
    site_edited="where the target is edited",
    sites="of several layers together: the target's sites",
    n_documents="documents of the positions",
)
describe(
    "feature_causal.jsonl",
    "one feature of the source, and one mapped direction of it that is added to the target",
    *PAIR_COLUMNS,
    DIRECTION,
    *intervals(
        "nats",
        effect="mean change of log p of the promoted tokens, at the middle dose",
        effect_at_kl="the same where the edit's KL divergence is kl_budget",
    ),
    *SPECIFIC,
    *intervals(ablation_r=ABLATION),
    feature="its number in the source's dictionary",
    match="the target's best matching feature",
    match_r="correlation of the two on training rows",
    n_contexts="texts in which it is tested",
    n_documents="their documents",
    firings="paired positions at which it fires",
    promoted_source="tokens that it makes likelier in the source",
    promoted_target="the same text in the target's tokens",
    kl="KL divergence that the edit causes, in nats",
    kl_budget="KL divergence at which effects are compared too: 0.1 nats, or the most all spend",
    doses="effect and kl by dose alpha, beside the controls and their range",
    ablation_r_shuffled="ablation_r of other features' mapped directions",
    p_random="p-value against random directions",
    p_shuffled="p-value against other features' mapped directions",
    p="the larger of the two",
    q="p by Benjamini and Hochberg over the features of this direction; of a feature that alone "
    "transfers 1 / (controls of a family) at best",
    transfers="whether q is within evaluation.fdr",
)
describe(
    "feature_causal_summary.jsonl",
    "what holds over all tested features of a kind of direction; intervals over features",
    *PAIR_COLUMNS,
    DIRECTION,
    *intervals(share_transferring="n_transferring / n_features"),
    *intervals("nats", effect="mean of the features' effects", kl="mean KL divergence"),
    *SPECIFIC,
    *intervals(ablation_r=ABLATION, ablation_r_shuffled="of other features' mapped directions"),
    n_features="features that are tested",
    n_scored="of these, those with a token that the target has",
    n_transferring="of these, those that transfer",
    n_ablation="features over which ablation_r is the mean",
    of_match="specific_random, as a share of the matching features'",
)
SPINE = tuple(TABLES.values())


def page() -> str:
    """Returns ``docs/results.md``: every registered table."""
    lines = [
        "# Result files\n",
        "JSON lines in `WORKDIR/results`. Undefined numbers are null. ± says that `NAME_low` and "
        "`NAME_high` stand beside a column: 95 % bootstrap intervals over documents, unless the "
        "table says otherwise. `checksums.json` seals the files: one that was altered is refused "
        "until it is deleted and its stage run again. This page is generated: `python -m "
        "launch.docs`.\n",
    ]
    for file, table in sorted(TABLES.items()):
        lines += [f"## {file}\n\nA row: {table.meaning}.\n"]
        lines += ["| column | meaning | unit or values |", "|---|---|---|"]
        for column in table.columns:
            name = f"`{column.name}`{' ±' if column.interval else ''}"
            allowed = ", ".join(f"`{value}`" for value in column.values) or column.unit
            lines.append(f"| {name} | {column.meaning} | {allowed} |")
        lines[-1] += "\n"
    return "\n".join(lines)

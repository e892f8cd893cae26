"""Probes: labels learned from one model's features, told from the other's."""

from crossdict_jax.results import PAIR_COLUMNS, describe, intervals, plain
from crossdict_jax.studies.probe.section import TITLE, section

__all__ = ["TABLE", "TITLE", "section"]
TABLE = describe(
    "probe.jsonl",
    "one probe trained on n labelled texts, used on held-out texts; intervals over texts",
    *PAIR_COLUMNS,
    *plain(
        probe="a kind of map: trained on what it predicts of the target's features, used "
        "on the target's own; own: trained on these too; source: trained and used on the "
        "source's; tokens: on counts of the source's tokens; majority: the commonest label",
        n="labelled examples",
        n_texts="held-out texts",
        n_classes="different labels",
        accuracy_shuffled="accuracy of the same probe trained on shuffled labels",
    ),
    *intervals(
        accuracy="on held-out texts, mean over draws of the examples",
        lead_tokens="accuracy, less that of tokens",
        behind_own="accuracy of the target's own features, less this",
    ),
)

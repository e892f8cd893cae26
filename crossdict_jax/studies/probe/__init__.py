"""Probes: labels learned from one model's features, told from the other's."""

from crossdict_jax.results import PAIR_COLUMNS, Column, Table, intervals, plain, register
from crossdict_jax.studies.probe.section import TITLE, section

__all__ = ["TABLE", "TITLE", "section"]
TABLE = register(
    Table(
        "probe.jsonl",
        "one probe trained on n labelled texts, used on held-out texts; intervals over texts",
        (
            *PAIR_COLUMNS,
            Column(
                "probe",
                "a kind of map: trained on what it predicts of the target's features, used on the "
                "target's own; own: trained on the target's own too; source: trained and used on "
                "the source's; tokens: on counts of the source's tokens; majority: the label that "
                "most examples have",
            ),
            *plain(
                n="labelled examples",
                n_draws="draws of the examples",
                n_texts="held-out texts",
                n_classes="different labels",
                n_duplicates="texts left out: they stand in the file twice",
                n_too_long="texts left out: longer than a context",
                n_not_rebuilt="texts left out: a tokenizer changes their characters",
                n_unpaired="texts left out: without a paired position",
            ),
            *intervals(accuracy="on held-out texts, mean over draws"),
            Column("accuracy_shuffled", "of the same probe trained on shuffled labels"),
            *intervals(
                lead_tokens="accuracy, less that of tokens",
                behind_own="accuracy of the target's own features, less this",
            ),
        ),
    )
)

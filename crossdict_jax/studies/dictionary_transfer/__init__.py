"""Dictionary transfer: one model's dictionary used for another, and as a start of training."""

from crossdict_jax.results import COUNTS, PAIR_COLUMNS, describe, intervals, plain
from crossdict_jax.studies.dictionary_transfer.section import TITLE, section

__all__ = ["TABLE", "TITLE", "section"]
TABLE = describe(
    "dictionary_transfer.jsonl",
    "one way to reconstruct the target with a dictionary that was not trained on it",
    *PAIR_COLUMNS,
    *plain(
        dictionary="own: the target's; transferred: the source's through ridge and back; "
        "orthogonal: through a rotation and back; as_is: unchanged; rotated: through a "
        "random rotation; stitch: there and back with no dictionary between",
        l0="active features per row",
        n_positions="text positions whose next token is scored",
    ),
    *COUNTS,
    *intervals(fvu="share of the variance that the reconstruction misses"),
    *intervals(
        "nats",
        ce="cross-entropy of the next token with the reconstruction put in",
        delta_ce="ce, less that of the untouched target",
    ),
)
TRAINING = describe(
    "dictionary_training.jsonl",
    "the target's dictionary trained from random parameters and from the source's",
    *PAIR_COLUMNS,
    *plain(
        error="which training error the curves show, fvu or mse",
        steps="training steps, one per point of the curves",
        random="error from random parameters",
        transferred="error from the source's dictionary",
        fvu_random="of the finished one, on test rows",
        fvu_transferred="of the finished one, on test rows",
        steps_to_reach="first step at which the transferred start is as good as the random "
        "one is in the end; null: never",
        saved="share of the steps that this spares",
    ),
)

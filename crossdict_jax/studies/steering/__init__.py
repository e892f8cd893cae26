"""Steering: what one model writes with a feature of another put into it."""

from crossdict_jax.results import PAIR_COLUMNS, Column, describe, plain
from crossdict_jax.studies.steering.section import RATES, TITLE, section

__all__ = ["TABLE", "TITLE", "section"]
ENDS = {
    "": "",
    "_more": ", less that without an edit",
    "_over_random": ", less that with a random direction of the same dose",
}
TABLE = describe(
    "steering/*.jsonl",
    "what was put in, or all texts of one edit and dose, or one text; intervals over texts",
    Column("row", "what the row is about", values=("feature", "condition", "text")),
    *PAIR_COLUMNS,
    *plain(
        feature="number in the source's dictionary",
        firings="of n_rows training rows on which it fires",
        n_rows="training rows that were read",
        promoted_source="tokens that it makes likelier in the source",
        promoted_target="the same text in the target's tokens",
        contexts="texts around its strongest firings",
        candidates="features that the search found",
        match="the target's best matching feature",
        match_r="correlation of the two",
        match_cosine="cosine of the mapped direction and the match's decoder row",
        settings="the values of config.steer",
        new_tokens="tokens written at most",
        seed="of the random numbers",
        condition="no edit, the mapped direction, a random one of equal norm, the match",
        alpha="dose",
        n_texts="texts of this edit",
        tokens="new tokens",
        prompt="number of the prompt",
        sample="number of the sample",
        before="the prompt",
        text="what was written",
    ),
    *(
        Column(name + end, meaning + more, unit, interval=True)
        for name, (meaning, unit, *_) in RATES.items()
        for end, more in ENDS.items()
    ),
)

"""Contrast sets: on which features a preference between two texts rests."""

from crossdict_jax.results import PAIR_COLUMNS, Column, describe, intervals, plain
from crossdict_jax.studies.contrast.section import FAMILIES, KINDS, TITLE, section

__all__ = ["TABLE", "TITLE", "section"]
TABLE = describe(
    "contrast.jsonl",
    "a model's preference, one feature, all chosen features taken out together, or mapped "
    "directions taken out of the other model; intervals over pairs of texts",
    Column("what", "what the row is about", values=KINDS),
    *PAIR_COLUMNS,
    *plain(
        set="name of the set of pairs",
        model="which model",
        site="where it is edited",
        direction="kind of map; match: the target's matching features; own: its top ones",
        n_pairs="pairs of texts",
        n_in_file="pairs in the file",
        accuracy_ablated="accuracy after the features are taken out",
        prefers="whether the model does better than chance",
        feature="number of a feature, chosen by attribution on the training half",
        n_features="how many",
        firings="tokens at which it fires",
        attribution_train="integrated gradients on the training half",
        moves="whether the effect is above every kind of control; null: no verdict",
        share_of_own="effect, as a share of that of the target's own top features",
        **{f"effect_{f}": f"what taking out {w} costs" for f, w in FAMILIES.items()},
        **{f"p_{f}": f"share of {w} that cost as much" for f, w in FAMILIES.items()},
    ),
    *intervals(
        accuracy="share of pairs whose good text is likelier",
        accuracy_unigram="the same by token counts alone",
        pair_r="correlation over pairs of what source and target lose",
    ),
    *intervals(
        "nats",
        preference="log p(good) - log p(bad)",
        attribution="integrated gradients on the test half",
        effect="preference that taking out costs",
        **{f"specific_{f}": f"effect above {w}" for f, w in FAMILIES.items()},
    ),
)

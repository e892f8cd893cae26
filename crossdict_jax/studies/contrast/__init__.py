"""Contrast sets: on which features a preference between two texts rests, in both models."""

from crossdict_jax.results import PAIR_COLUMNS, Column, Table, intervals, nats, plain, register
from crossdict_jax.studies.contrast.section import TITLE, section

__all__ = ["TABLE", "TITLE", "section"]
FAMILIES = {
    "random": "random directions",
    "shuffled": "other features' directions",
    "others": "other features where they fire",
}
TABLE = register(
    Table(
        "contrast.jsonl",
        "a model's preference, one feature, all chosen features taken out together, what one "
        "feature adds through another, or mapped directions taken out of the other model; "
        "intervals over pairs of texts",
        (
            Column("set", "name of the set of pairs"),
            Column(
                "what",
                "what the row is about",
                values=("preference", "feature", "ablation", "edge", "transfer"),
            ),
            *plain(model="which model", site="where it is edited"),
            *PAIR_COLUMNS,
            Column(
                "direction",
                "of a transfer: kind of map that gave the mapped directions; match: the target's "
                "matching features; own: the target's own top features",
            ),
            *plain(
                n_pairs="pairs of texts",
                n_in_file="pairs in the file",
                n_duplicates="left out: they stand in the file twice",
                n_too_long="left out: longer than a context",
                n_not_rebuilt="left out: a tokenizer changes their characters",
                n_nested="left out: one text begins the other",
            ),
            *intervals(
                accuracy="share of pairs whose good text is likelier",
                accuracy_swapped="the same with labels swapped at random",
                accuracy_unigram="the same by token counts alone",
            ),
            Column("accuracy_ablated", "the same after the features are taken out"),
            *nats(preference="log p(good) - log p(bad)"),
            *plain(
                prefers="whether the model does better than chance",
                prefers_source="whether the source does",
                prefers_target="whether the target does",
                feature="number of a feature",
                chosen="top: by attribution on the training half; random: among the others",
                features="the chosen features",
                n_features="how many",
                firings="tokens at which it fires",
                attribution_train="integrated gradients on the training half",
            ),
            *nats(
                attribution="integrated gradients on the test half",
                effect="preference that taking out costs",
            ),
            *plain(
                **{f"effect_{f}": f"what taking out {w} costs" for f, w in FAMILIES.items()},
                **{f"p_{f}": f"share of {w} that cost as much" for f, w in FAMILIES.items()},
            ),
            *nats(**{f"specific_{f}": f"effect above {w}" for f, w in FAMILIES.items()}),
            *plain(
                moves="whether the effect is above every kind of control; null: no verdict",
                attribution_r_train="correlation of attribution_train and effect over features",
                attribution_r="correlation of attribution and effect over features",
                share_of_own="effect, as a share of that of the target's own top features",
            ),
            *intervals(pair_r="correlation over pairs of what source and target lose"),
            *plain(
                site_lower="of an edge: where it begins",
                feature_lower="the feature there",
                site_upper="where it ends",
                feature_upper="the feature there",
            ),
        ),
    )
)

"""Pareto: sparsity against what is explained, for every architecture."""

from crossdict_jax.results import COUNTS, describe, intervals, plain
from crossdict_jax.studies.pareto.section import TITLE, section

__all__ = ["TABLE", "TITLE", "section"]
TABLE = describe(
    "pareto.jsonl",
    "one dictionary on the curve of its architecture",
    *plain(
        data="planted features, or activations of the run",
        model="whose activations they are",
        site="where they are read",
        architecture="of the dictionary",
        seed="of the dictionary",
        k="active features that the architecture fixes",
        l1_coefficient="of the penalty, where it does not",
        width="number of features",
        steps="of training",
        dead_fraction="share of features that fire in no test row",
        planted="planted features that are active in a row",
        cosine="mean over planted features of the cosine to the nearest decoder row",
    ),
    *COUNTS,
    *intervals(
        l0="active features per row", fvu="share of the variance that the reconstruction misses"
    ),
)

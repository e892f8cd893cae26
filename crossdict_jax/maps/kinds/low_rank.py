"""Reduced-rank ridge regression on activations: how many directions do the models share?"""

import numpy as np

from crossdict_jax.maps.base import AffineMap

RANKS = (1, 4, 16, 64, 128, 256)  # those up to the smaller d_model are tried


class LowRank(AffineMap):
    """``x_B = (x_A - mean_a) W V V' + mean_b``, V [d_b, rank] the leading fitted directions.

    W is the ridge solution and V the leading right singular vectors of its fitted values, the
    penalty counted as rows: the best map of its rank under squared error plus penalty (Izenman
    1975; Mukherjee and Zhu 2011). W V V' is stored. Penalty and rank are chosen by validation MSE
    of x_B.
    """

    kind = "low_rank"
    chosen = ("penalty", "rank")

    @classmethod
    def solve(cls, problem, config):
        regression, errors, directions = problem.regression, {}, {}
        validation = regression.validation
        for penalty in config.ridge_penalties:
            V = directions[penalty] = regression.directions(penalty)
            fitted = regression.solution(penalty) @ V  # [d_a, d_b], a column per direction
            # |b - W V_r V_r' a|^2 is a sum over directions: |V'b|^2 less what each explains.
            explained = 2 * np.sum(fitted * (validation.ab @ V), axis=0)
            explained -= np.sum(fitted * (validation.aa @ fitted), axis=0)
            left = validation.bb - np.cumsum(explained)
            for rank in RANKS:
                if rank <= min(fitted.shape):
                    errors[penalty, rank] = float(left[rank - 1] / (validation.n * len(V)))

        def values(penalty: float, rank: int):
            V = directions[penalty][:, :rank]
            return regression.affine(regression.solution(penalty) @ V @ V.T)

        return errors, values

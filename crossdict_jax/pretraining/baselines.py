"""Count-based language models: what a trained one must beat."""

import numpy as np


def unigram_loss(train: np.ndarray, test: np.ndarray, *, vocab_size: int) -> float:
    """Returns mean nats per token of ``test`` under add-one unigram counts; ids are [n]."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts[test] / counts.sum()).mean())


def bigram_loss(train: np.ndarray, test: np.ndarray, *, vocab_size: int) -> float:
    """Returns nats per token of ``test[1:]`` under an interpolated bigram model of ``train``.

    Interpolated with the unigram by Witten and Bell's rule (1991): the more different successors a
    token had, the more weight the unigram gets.
    """
    pairs = train[:-1].astype(np.int64) * vocab_size + train[1:]
    keys, counts = np.unique(pairs, return_counts=True)
    total = np.bincount(train[:-1], minlength=vocab_size)
    kinds = np.bincount(keys // vocab_size, minlength=vocab_size)
    unigram = np.bincount(train, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    before, after = test[:-1], test[1:]
    wanted = before.astype(np.int64) * vocab_size + after
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    seen = np.where(keys[index] == wanted, counts[index], 0)
    weight = np.maximum(total[before] + kinds[before], 1)
    share = np.where(total[before] > 0, kinds[before] / weight, 1.0)
    probability = np.where(total[before] > 0, seen / weight, 0.0) + share * unigram[after]
    return float(-np.log(probability).mean())

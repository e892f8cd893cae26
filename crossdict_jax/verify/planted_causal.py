"""Two language models in which known directions do known things."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from crossdict_jax import models
from crossdict_jax.causal.effects import Experiment, ModelAtSite
from crossdict_jax.causal.vocabulary import Translation
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.dictionaries.base import decoder_rows, find, from_arrays
from crossdict_jax.maps import Pairs, Side
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.models.run import Passages, Runner

SITE = Site(1)
FEATURES = 12
LINKED = 8  # do the same in both models; in B the others do nothing
WORDS = 40  # FEATURES triggers, as many targets, and neutral words
LENGTH = 24  # words of a text
PUSH = 0.4  # of a feature on the logit of its target, per unit after the last norm
TRIGGER = 1.0  # of a feature's own word in its direction; other words: about 0.1
THRESHOLD = 0.6  # below which a feature does not fire
QUIET = 0.3  # scale of the random logits
COMMON = {"vocab_size": WORDS, "initializer_range": 0.1}
GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 2, "n_positions": 32}
NEOX = {"model_type": "gpt_neox", "hidden_size": 64, "num_hidden_layers": 2, "rotary_pct": 0.5}
NEOX |= {"num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32}
SHAPES = (COMMON | GPT2 | {"tie_word_embeddings": False}, COMMON | NEOX)


@dataclasses.dataclass(frozen=True)
class Planted:
    """The planted truth.

    In A, feature i (row i of its dictionary's W_dec, at SITE) fires at word i and raises word
    FEATURES + i. In B, whose words are numbered by ``words``, the feature of that index does the
    same for i < LINKED, and nothing for the others. Rows of W_dec are orthonormal.
    """

    lms: tuple[LanguageModel, LanguageModel]
    dictionaries: tuple[Dictionary, Dictionary]
    texts: np.ndarray  # int32 [texts, seq], in A's words
    words: np.ndarray  # int [WORDS], B's number of each of A's words

    def experiment(self) -> tuple[Experiment, Pairs]:
        """Returns an experiment whose ``mapped`` directions are to come, and rows to fit maps on.

        These are all positions but the first of each text.
        """
        n, seq = self.texts.shape
        text, position = np.divmod(np.arange(n * (seq - 1)), seq - 1)
        last = position + 1  # the first position is never paired
        at = {"window": text, "position": last, "first": last, "end": np.minimum(last + 1, seq - 1)}
        texts = self.texts, self.words[self.texts].astype(np.int32)
        source, target = (
            ModelAtSite(Runner(lm, batch_size=64), SITE, Passages(list(t), **at))
            for lm, t in zip(self.lms, texts)
        )
        x, tokens = (source.x, target.x), (t[:, 1:].ravel() for t in texts)
        pairs = Pairs(*map(Side, x, tokens, self.dictionaries), text)
        features, dictionary = np.arange(FEATURES), self.dictionaries[0]
        pieces = tuple(f"word{i} ".encode() for i in range(WORDS))
        experiment = Experiment(
            source=source,
            target=target,
            documents=text,
            features=features,
            tested=FEATURES,
            strength=np.asarray(dictionary.encode(pairs.source.x)),
            directions=decoder_rows(dictionary, features),
            mapped={},
            translation=Translation(pieces, tuple(pieces[i] for i in np.argsort(self.words))),
        )
        return experiment, pairs


def plant(*, texts: int = 24, seed: int = 0) -> Planted:
    """Returns two random models with FEATURES planted directions, and texts of random words."""
    generator = np.random.default_rng(seed)
    words = generator.permutation(WORDS)
    lms, dictionaries = [], []
    for m, shape in enumerate(SHAPES):
        lm = models.init(shape, seed=2 * seed + m)
        # Orthonormal rows of mean zero: a layer norm removes nothing from them.
        rows = generator.normal(size=(FEATURES, lm.config.d_model))
        rows -= rows.mean(1, keepdims=True)
        V = np.linalg.qr(rows.T)[0].T.astype(np.float32)
        # Word i, number[i] in the model, writes direction i; the first directions raise
        # their targets' logits.
        number, pushing = ((np.arange(WORDS), FEATURES), (words, LINKED))[m]
        lm.W_E[...] = lm.W_E[...].at[jnp.asarray(number[:FEATURES])].add(TRIGGER * V)
        targets = jnp.asarray(number[FEATURES : FEATURES + pushing])
        lm.W_U[...] = (QUIET * lm.W_U[...]).at[:, targets].add(PUSH * V[:pushing].T)
        lms.append(lm)
        arrays = {"W_enc": V.T, "b_enc": np.full(FEATURES, -THRESHOLD), "W_dec": V}
        arrays["b_dec"] = np.zeros(lm.config.d_model)
        dictionaries.append(from_arrays(find("relu"), arrays))
    # Half of the words of a text are triggers; half of the triggers' targets follow them.
    shape = texts, LENGTH
    text = generator.integers(0, WORDS, shape).astype(np.int32)
    triggers = generator.integers(0, FEATURES, shape).astype(np.int32)
    text = np.where(generator.random(shape) < 0.5, triggers, text)
    follows = (text[:, :-1] < FEATURES) & (generator.random((texts, LENGTH - 1)) < 0.5)
    text[:, 1:][follows] = text[:, :-1][follows] + FEATURES
    return Planted(tuple(lms), tuple(dictionaries), text, words)

"""Two language models in which known directions do known things, and a map between them."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from crossdict_jax import models
from crossdict_jax.causal.directions import mapped_directions
from crossdict_jax.causal.effects import MATCH, Directions, Experiment, ModelAtSite
from crossdict_jax.causal.vocabulary import Translation
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.dictionaries.base import decoder_rows
from crossdict_jax.maps.base import Map, Side
from crossdict_jax.maps.kinds.ridge import Ridge
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.models.run import Passages, Runner
from crossdict_jax.verify.lab import made

SITE = Site(1)
FEATURES = 12
LINKED = 8  # do the same in both models; in B the others do nothing
WORDS = 40  # FEATURES triggers, as many targets, and neutral words
LENGTH = 24  # words of a text
PUSH = 0.4  # of a feature on the logit of its target, per unit after the last norm
TRIGGER = 1.0  # of a feature's own word in its direction; other words: about 0.1
THRESHOLD = 0.6  # below which a feature does not fire
QUIET = 0.3  # scale of the random logits
SHAPES = (
    {
        "model_type": "gpt2",
        "vocab_size": WORDS,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    },
    {
        "model_type": "gpt_neox",
        "vocab_size": WORDS,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "rotary_pct": 0.5,
        "initializer_range": 0.1,
    },
)


@dataclasses.dataclass(frozen=True)
class Planted:
    """The planted truth.

    In A, feature i (direction ``dictionary_a.W_dec[i]`` at SITE) fires at word i and raises word
    FEATURES + i. In B, whose words are numbered by ``words``, its direction under ``map`` does the
    same for i < LINKED, and nothing for the others.
    """

    lms: tuple[LanguageModel, LanguageModel]
    dictionaries: tuple[Dictionary, Dictionary]
    map: Map
    texts: np.ndarray  # int32 [texts, seq], in A's words
    words: np.ndarray  # int [WORDS], B's number of each of A's words

    def sides(self, source: ModelAtSite, target: ModelAtSite) -> tuple[Side, Side]:
        """Returns both models' activations and tokens at the positions that they have read."""
        words = self.texts[source.passages.window, source.passages.position]
        tokens = (words, self.words[words].astype(np.int32))
        each = zip((source, target), tokens, self.dictionaries)
        return tuple(Side(model.x, t, dictionary) for model, t, dictionary in each)

    def experiment(self) -> Experiment:
        """Returns the planted features as an experiment, by the ridge map and by the match."""
        n, seq = self.texts.shape
        text, position = np.divmod(np.arange(n * (seq - 1)), seq - 1)
        last = position + 1  # the first position is never paired
        at = {"window": text, "position": last, "first": last, "end": np.minimum(last + 1, seq - 1)}
        texts = self.texts, self.words[self.texts].astype(np.int32)
        source, target = (
            ModelAtSite(Runner(lm, batch_size=64), SITE, Passages(list(t), **at))
            for lm, t in zip(self.lms, texts)
        )
        sides = self.sides(source, target)
        f_a, f_b = (np.asarray(side.dictionary.encode(side.x)) for side in sides)
        features = np.arange(FEATURES)
        vectors = mapped_directions(self.map, sides[0], features, f_a, seed=0)
        pieces = [f"word{i} ".encode() for i in range(WORDS)]
        of_target = [pieces[i] for i in np.argsort(self.words)]
        return Experiment(
            source=source,
            target=target,
            documents=text,
            features=features,
            tested=FEATURES,
            strength=f_a,
            directions=decoder_rows(self.dictionaries[0], features),
            mapped={
                "ridge": Directions(vectors),
                MATCH: Directions(decoder_rows(self.dictionaries[1], features), f_b),
            },
            translation=Translation(tuple(pieces), tuple(of_target)),
        )


def plant(*, texts: int = 24, seed: int = 0) -> Planted:
    """Returns two random models with FEATURES planted directions, and texts of random words."""
    generator = np.random.default_rng(seed)
    words = generator.permutation(WORDS)
    lms, directions = [], []
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
        directions.append(V)
    fires_above = {"b_enc": np.full(FEATURES, -THRESHOLD)}
    dictionaries = tuple(made("relu", V.T, V, **fires_above) for V in directions)
    d_a, d_b = (lm.config.d_model for lm in lms)
    W = directions[0].T @ directions[1]
    values = {"mean_a": np.zeros(d_a), "W": W, "mean_b": np.zeros(d_b)}
    return Planted(
        lms=tuple(lms),
        dictionaries=dictionaries,
        map=Ridge(dictionaries[1], values),
        texts=_texts(generator, texts),
        words=words,
    )


def _texts(generator: np.random.Generator, n: int) -> np.ndarray:
    """Returns random words, half of them triggers; half of the triggers' targets follow them."""
    words = generator.integers(0, WORDS, (n, LENGTH)).astype(np.int32)
    triggers = generator.integers(0, FEATURES, words.shape).astype(np.int32)
    words = np.where(generator.random(words.shape) < 0.5, triggers, words)
    follows = (words[:, :-1] < FEATURES) & (generator.random((n, LENGTH - 1)) < 0.5)
    words[:, 1:][follows] = words[:, :-1][follows] + FEATURES
    return words

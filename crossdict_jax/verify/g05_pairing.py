"""G5: two tokenizers pair exactly where both end a token; one token late, nothing is gained."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np

from crossdict_jax import models
from crossdict_jax.activations import pair
from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Gate, at_least, at_most, equal, shown
from crossdict_jax.verify.planted import PlantedConfig, TextConfig, streams

TEXTS = 300  # random ones
ALPHABETS = (  # what texts are drawn from: words, runs of spaces, accents that NFC joins, astral
    "etaoin shrdlu def return_ 0123",
    "  \n\t()[]=:",
    "aeiou\u0301\u0308\u0323 \u00e9\u1e69",
    "\u4e2d\u6587\u304b\u3099\u0928\u093f\u0e01 ",
    "\U0001f600\U0001f468\u200d\U0001f469\U0001f1e9\U0001f1ea\ufe0f a",
)
# Fewer features than dimensions, so that what a rung loses is lost to the pairing alone.
PLANTED = PlantedConfig(
    documents=160, features=24, widths=(32, 40), exclusive=0.0, active=3.0, from_token=0.5
)


def gate(*, seed: int, directory: Path) -> Gate:
    wrong, pairs = _random_texts(seed)
    right, late = (_gains(seed, directory / str(shift), shift) for shift in (0, 1))
    return Gate(
        "G5",
        "two tokenizers on one text: exact pairs, and none but these carry the gain",
        (
            equal(
                f"random texts whose pairs differ from a brute-force count, of {TEXTS}", wrong, 0
            ),
            shown("pairs in them", pairs),
            at_least("context gain of ridge on planted streams", right["aligned"], 0.9),
            at_most("the same, read one token late", late["aligned"], 0.05),
            at_most("the same, pairs shuffled", right["shuffled"], 0.05),
        ),
    )


def _random_texts(seed: int) -> tuple[int, int]:
    """Returns (texts whose pairs are not those of the brute force, pairs in all texts)."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    tokenizers = [models.load_tokenizer(name) for name in models.EMBEDDED]
    wrong, pairs = 0, 0
    for _ in range(TEXTS):
        alphabet = [*ALPHABETS[rng.integers(len(ALPHABETS))], *ALPHABETS[0]]
        text = "".join(rng.choice(alphabet, rng.integers(1, 120)))
        found = pair(text, *tokenizers)
        triples = set(zip(*map(np.ndarray.tolist, vars_of(found))))
        wrong += triples != _brute_force(unicodedata.normalize("NFC", text), tokenizers)
        pairs += len(triples)
    return wrong, pairs


def vars_of(found) -> tuple[np.ndarray, ...]:
    return found.byte_end, found.position_a, found.position_b


def _brute_force(text: str, tokenizers) -> set[tuple[int, int, int]]:
    """Returns all (byte end, position, position): the bytes of every prefix of tokens, compared."""
    last = [{end: i for i, end in enumerate(_ends(text, t))} for t in tokenizers]
    common = last[0].keys() & last[1].keys()
    return {(e, last[0][e], last[1][e]) for e in common if last[0][e] > 0 and last[1][e] > 0}


def _ends(text: str, tokenizer) -> list[int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    prefixes = [bytes(byte_of[c] for c in "".join(tokens[: i + 1])) for i in range(len(tokens))]
    assert b"".join(prefixes[-1:]) == text.encode()
    return [len(prefix) for prefix in prefixes]


def _gains(seed: int, directory: Path, shift: int) -> dict[str, float]:
    """Returns the context gain of ridge on aligned and on shuffled pairs."""
    planted = streams(PLANTED, TextConfig(), seed).paired(shift=shift)
    made = [lab.exact(d) for d in planted.directions]
    both, config = ("aligned", "shuffled"), lab.planted_config(seed=seed)
    rows = lab.planted_ladder(planted, made, config, directory, pairings=both)
    return {p: lab.pick(rows, "ridge", pairing=p)["context_gain"] for p in both}

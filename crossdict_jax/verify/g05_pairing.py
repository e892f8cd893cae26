"""G5: two tokenizers pair exactly where both end a token; one token late, nothing is gained."""

import unicodedata
from pathlib import Path

from crossdict_jax import models, stats
from crossdict_jax.activations import pair
from crossdict_jax.results import PAIRINGS
from crossdict_jax.verify import lab
from crossdict_jax.verify.gate import Check
from crossdict_jax.verify.planted import PlantedConfig, streams

TEXTS = 300  # random ones
ALPHABETS = (  # words, runs of spaces, accents that NFC joins, astral
    "etaoin shrdlu def return_ 0123",
    "  \n\t()[]=:",
    "aeiou\u0301\u0308\u0323 \u00e9\u1e69",
    "\u4e2d\u6587\u304b\u3099\u0928\u093f\u0e01 ",
    "\U0001f600\U0001f468\u200d\U0001f469\U0001f1e9\U0001f1ea\ufe0f a",
)
# Fewer features than dimensions: what a map loses is lost to the pairing alone.
PLANTED = PlantedConfig(
    documents=160, features=24, widths=(32, 40), exclusive=0.0, active=3.0, from_token=0.5
)


def gate(*, seed: int, directory: Path) -> list[Check]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    rng = stats.generator(seed)
    tokenizers = [models.load_tokenizer(name) for name in models.EMBEDDED]
    wrong = 0
    for _ in range(TEXTS):
        alphabet = [*ALPHABETS[rng.integers(len(ALPHABETS))], *ALPHABETS[0]]
        text = "".join(rng.choice(alphabet, rng.integers(1, 120)))
        p = pair(text, *tokenizers)
        triples = set(zip(p.byte_end.tolist(), p.position_a.tolist(), p.position_b.tolist()))
        # By brute force: the bytes of every prefix of tokens. The first is never paired.
        text, ends = unicodedata.normalize("NFC", text), []
        for tokenizer in tokenizers:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens = tokenizer.convert_ids_to_tokens(ids)
            prefixes = ["".join(tokens[: i + 1]) for i in range(len(tokens))]
            prefixes = [bytes(byte_of[c] for c in prefix) for prefix in prefixes]
            assert b"".join(prefixes[-1:]) == text.encode()
            ends.append({len(prefix): i for i, prefix in enumerate(prefixes) if i > 0})
        wrong += triples != {(end, ends[0][end], ends[1][end]) for end in ends[0] if end in ends[1]}
    gains, settings = {}, {"seed": seed, "pairings": PAIRINGS}
    for shift in (0, 1):
        planted = streams(PLANTED, seed, shift=shift)
        made = [lab.exact(d) for d in planted.truth.directions]
        rows = lab.planted_rows(planted, made, directory / str(shift), **settings)
        for pairing in PAIRINGS:
            gains[shift, pairing] = lab.pick(rows, "ridge", pairing=pairing)["context_gain"]
    return [
        Check(f"of {TEXTS} random texts, pairs differ from a brute-force count in", wrong, "==", 0),
        Check("context gain of ridge on planted streams", gains[0, "aligned"], ">=", 0.9),
        Check("the same, read one token late", gains[1, "aligned"], "<=", 0.05),
        Check("the same, pairs shuffled", gains[0, "shuffled"], "<=", 0.05),
    ]

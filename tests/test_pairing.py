"""Byte ends, pairs and windows, checked against independent oracles on arbitrary Unicode."""

import functools
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_run import DATA, needs_data, refused
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from crossdict_jax.activations import pairing

TEXT = """Returns the mean of the array elements along the given axis.
    The mean is taken over the flattened array by default, otherwise over the specified axis.
    Parameters: axis, dtype, out, keepdims. It's what you'd expect; they'll see we've 12 of 345.
The quick brown fox jumps over the lazy dog, naïve café, again and again and again.
"""
ENGLISH = 4 * TEXT

# Where tokenizers go wrong: combining marks, jamo, emoji, private use, spaces, literal specials.
TRICKY = [
    "<|endoftext|>", "<s>", "</s>", " ", "  ", "      ", "\n", "\n\n", "\t", "\r\n", "\u3000",
    "\u00a0", "\u2003", "é", "e\u0301", "\u0301", "A\u030a", "\u212b", "\u0344", "q\u0307\u0323",
    "한글", "\u1112\u1161\u11ab", "\u11ab", "漢字", "😀", "👩‍👩‍👧", "🇩🇪", "\ue000", "\U000f0000",
    "\u200b", "\ufffd", "\x00", "\x1f", "▁", "<0x41>", "Ġ", "ﬁ", "ß", "don't", " the",
    "The", "axis", "123", "...",
]  # fmt: skip
pieces = st.one_of(st.sampled_from(TRICKY), st.text(max_size=8), st.sampled_from(ENGLISH.split()))
tricky_text = st.lists(pieces, max_size=12).map("".join)


def train_byte_level(vocab_size, *, normalizer=None):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    how = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    how |= {"special_tokens": ["<|endoftext|>"], "vocab_size": vocab_size}
    tokenizer.train_from_iterator([ENGLISH], trainers.BpeTrainer(**how))
    return tokenizer


def llama_style(*, metaspace=False):
    """As Llama's (or with SentencePiece's Metaspace): an invented "▁" in front, bytes of others."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("▁", "▁"), ("i", "s")]
    for token in sorted(set(ENGLISH.replace(" ", "▁"))) + [a + b for a, b in merges]:
        vocab[token] = len(vocab)
    bpe = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    else:
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(parts)
        steps.insert(0, decoders.Replace("▁", " "))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


metaspace = functools.partial(llama_style, metaspace=True)
# A vocabulary of single characters that silently drops the others.
CHARACTERS = tokenizers.Tokenizer(
    models.BPE({character: i for i, character in enumerate(sorted(set(ENGLISH)))}, [])
)
CHARACTERS.decoder = decoders.Fuse()
LLAMA, THIRD = llama_style(), train_byte_level(280)


@pytest.fixture(scope="module")
def small():
    """Two byte-level tokenizers of different sizes, the second one normalising, as Pythia's."""
    return train_byte_level(400), train_byte_level(320, normalizer=normalizers.NFC())


@pytest.fixture(scope="module")
def real():
    files = (f"{DATA}/tokenizers/{name}/tokenizer.json" for name in ("gpt2", "pythia"))
    return [PreTrainedTokenizerFast(tokenizer_file=file) for file in files]


@functools.lru_cache(maxsize=8)
def vocabulary(tokenizer):
    """Returns (id -> token, ids of added tokens), from the library's own tables."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    added = backend.get_added_tokens_decoder()
    tokens = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    return tokens | {i: token.content for i, token in added.items()}, set(added)


def oracle_ends(text, tokenizer):
    """Byte ends of a byte-level tokenizer: the length of the bytes of every prefix of tokens."""
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens, added = vocabulary(tokenizer)  # added ones stand for themselves
    plain = {"add_special_tokens": False}
    if isinstance(tokenizer, tokenizers.Tokenizer):
        ids = tokenizer.encode(text, **plain).ids
    else:
        ids = tokenizer(text, **plain)["input_ids"]
    prefix, ends = b"", []
    for i in ids:
        prefix += tokens[i].encode() if i in added else bytes(to_byte[c] for c in tokens[i])
        ends.append(len(prefix))
    assert prefix == text.encode()
    return ids, ends


def oracle_pairs(*all_ends):
    """All tuples of positions, none 0, whose ends agree: the last such tuple for each end."""
    found = {}
    for end in sorted(set(all_ends[0])):
        if end and all(end in ends for ends in all_ends):
            found[end] = [max(i for i, e in enumerate(ends) if e == end) for ends in all_ends]
    return [(end, at) for end, at in found.items() if min(at) > 0], len(found)


def check_ends(text, tokenizer):
    nfc = unicodedata.normalize("NFC", text)
    ids, ends = oracle_ends(nfc, tokenizer)
    found = pairing.byte_ends(text, tokenizer)
    assert found.ids.tolist() == ids and found.ends.tolist() == ends
    return ends


@pytest.mark.parametrize("two", ["small", pytest.param("real", marks=needs_data)])
@given(text=tricky_text)
@example(text="")
@example(text="😀")
@example(text="e\u0301<|endoftext|>   x\n\n   y")
@settings(max_examples=200, deadline=None)
def test_pairs_equal_brute_force(small, request, two, text):
    a, b = small if two == "small" else request.getfixturevalue("real")
    ends_a, ends_b = check_ends(text, a), check_ends(text, b)
    expected, common = oracle_pairs(ends_a, ends_b)
    found = pairing.pair(text, a, b)
    positions = np.stack([found.position_a, found.position_b], axis=-1).tolist()
    assert list(zip(found.byte_end.tolist(), positions)) == expected
    if text:
        assert found.coverage_a == common / len(set(ends_a))
        assert found.coverage_b == common / len(set(ends_b))
        last = len(unicodedata.normalize("NFC", text).encode())
        if min(len(ends_a), len(ends_b)) > 1:
            assert found.byte_end[-1] == last  # the end of the text is a pair


def test_texts_of_known_ends(small):
    found = pairing.pair("a 漢字", *small)  # no merges beyond ASCII: a token a byte
    assert set(found.byte_end.tolist()) >= {3, 4, 5, 6, 7, 8}  # also inside a character
    decomposed, composed = "cafe\u0301 the the", "caf\u00e9 the the"
    found, expected = (pairing.pair(text, *small) for text in (decomposed, composed))
    assert found.byte_end.tolist() == expected.byte_end.tolist()  # normalised once for both
    assert found.byte_end[-1] == len(composed.encode())
    tokens = pairing.byte_ends("the<|endoftext|>the", small[0])
    assert {3, 16} <= set(tokens.ends.tolist())
    assert tokens.ids.tolist().count(0) == 1  # the literal is read as the special token
    table = pairing.token_bytes(small[0])
    assert len(table) == small[0].get_vocab_size() and table[0] == b"<|endoftext|>"
    assert {b" the", *(bytes([b]) for b in range(256))} <= set(table)


def test_truncation_padding_and_bos_of_a_tokenizer_are_left_out():
    tokenizer = train_byte_level(300)
    expected = pairing.byte_ends(ENGLISH, tokenizer).ids.tolist()
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=16)
    bos = {"single": "<|endoftext|> $A", "special_tokens": [("<|endoftext|>", 0)]}
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**bos)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert pairing.byte_ends(ENGLISH, wrapped).ids.tolist() == expected
    assert wrapped(ENGLISH, add_special_tokens=False)["input_ids"] == expected
    assert pairing.byte_ends(ENGLISH, wrapped).ids.tolist() == expected
    tokenizer.add_tokens(["[new]"])  # known at once
    assert pairing.byte_ends("[new]", tokenizer).ends.tolist() == [5]
    tokenizer.no_padding()
    tokenizer.add_tokens(["h"])  # which the vocabulary has, but now stands alone
    ids = tokenizer.encode("the", add_special_tokens=False).ids
    assert pairing.byte_ends("the", tokenizer).ids.tolist() == ids
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    ids = tokenizer.encode("the", add_special_tokens=False).ids
    assert pairing.byte_ends("the", tokenizer).ids.tolist() == ids
    refused("not a fast tokenizer", pairing.byte_ends, "text", object())
    refused("has half a character", pairing.byte_ends, "\ud800", object())
    refused("A text is a str, not bytes", pairing.byte_ends, b"text", tokenizer)


@pytest.mark.parametrize(
    ("build", "text", "tokens", "ends"),
    [
        (llama_style, "the axis", "▁the ▁a x is", [3, 5, 6, 8]),
        (llama_style, " the", "▁ ▁the", [0, 4]),
        (llama_style, "é😀", "▁ é <0xF0> <0x9F> <0x98> <0x80>", [0, 2, 3, 4, 5, 6]),
        (llama_style, "the<s>the</s>", "▁the <s> ▁the </s>", [3, 6, 9, 13]),
        (llama_style, "<s> the", "<s> ▁ ▁the", [3, 3, 7]),
        (llama_style, "the<s>  <s>", "▁the <s> ▁▁ ▁ <s>", [3, 6, 7, 8, 11]),
        (llama_style, "<s><s>", "<s> <s>", [3, 6]),
        (metaspace, "the axis", "▁the ▁a x is", [3, 5, 6, 8]),
        (metaspace, " the", "▁the", [4]),  # has its space already: none is invented
        (metaspace, "é", "▁ é", [0, 2]),
        (metaspace, "the<s>the</s>", "▁the <s> ▁the </s>", [3, 6, 9, 13]),
        (metaspace, "<s> the", "<s> ▁the", [3, 7]),
    ],
)
def test_invented_prefix_counts_no_byte(build, text, tokens, ends):
    tokenizer = build()
    found = pairing.byte_ends(text, tokenizer)
    assert [tokenizer.id_to_token(i) for i in found.ids] == tokens.split()
    assert found.ends.tolist() == ends


def test_dropped_and_changed_characters_drop_the_text(small):
    plain = CHARACTERS
    assert pairing.byte_ends("the axis", plain).ends.tolist() == list(range(1, 9))
    refused("drops or changes", pairing.byte_ends, "the 漢 axis", plain)
    lower = train_byte_level(300, normalizer=normalizers.Lowercase())
    found = pairing.byte_ends_batch(["small", "Large", ""], lower)
    assert [tokens.ends is None for tokens in found] == [False, True, False]
    # Read as a space: one byte instead of three.
    refused("drops or changes", pairing.byte_ends, "the ▁ axis", LLAMA)
    texts = ["the axis", "漢", "▁"]
    found = pairing.windows(texts, (small[0], LLAMA, CHARACTERS), limits=(9, 9, 9))
    assert [text_of(window, texts) for window in found.windows] == ["the axis"]
    assert found.not_rebuilt == (0, 1, 2)
    text = ENGLISH[:300] + " 漢 " + ENGLISH[300:600]
    found = pairing.windows([text], (small[0], CHARACTERS), limits=(64, 32))
    assert found.not_rebuilt == (0, 1)  # the others are kept
    assert sum(len(text_of(window, [text])) for window in found.windows) >= len(text) - 32


def test_statistics_of_known_pairings():
    *_, found = pairing.pair_many([np.arange(1, 21), np.array([20])])
    assert found.span_tokens[0] == (0, 0, 0, 0, 0, 0, 0, 1)  # long spans go to the last bin
    a, b = np.array([1, 3, 4, 6, 7]), np.array([1, 4, 6, 7])
    *_, found = pairing.pair_many([a, b])
    assert (found.ends, found.common, found.first_positions) == ((5, 4), 4, 1)
    assert found.coverage == (0.8, 1.0)
    assert found.one_to_one == 3  # 1, 4-6 and 6-7; 1-4 is two tokens of A
    assert found.span_tokens[0][:3] == (3, 1, 0) and found.span_tokens[1][:3] == (4, 0, 0)
    in_json = (found + found).to_json(["gpt2", "pythia"])
    assert [in_json[key] for key in ("texts", "common_ends", "pairs")] == [2, 8, 6]
    assert in_json["one_to_one_spans"] == 0.75 and in_json["first_positions_masked"] == 2
    spans = {"1": 6, "2": 2, **dict.fromkeys("34567", 0), "8+": 0}
    assert in_json["models"]["gpt2"] == {"ends": 10, "coverage": 0.8, "tokens_per_span": spans}


def text_of(window, texts):
    """The bytes that a window holds, by the ends of its tokens."""
    document = unicodedata.normalize("NFC", texts[window.document]).encode()
    return document[window.start :][: window.tokens[0].ends[-1]].decode()


def check_windows(texts, tokenizers_, limits):
    found = pairing.windows(texts, tokenizers_, limits=limits)
    for window in found.windows:
        text = text_of(window, texts)
        assert text
        for tokenizer, tokens, limit in zip(tokenizers_, window.tokens, limits):
            assert len(tokens.ids) <= limit
            alone = pairing.byte_ends(text, tokenizer)  # cut first, then tokenized
            assert tokens.ids.tolist() == alone.ids.tolist()
            assert tokens.ends.tolist() == alone.ends.tolist()
    order = [(window.document, window.start) for window in found.windows]
    assert order == sorted(set(order))
    if not any(found.not_rebuilt) and not found.too_long:
        for number, text in enumerate(texts):
            parts = [text_of(w, texts) for w in found.windows if w.document == number]
            assert "".join(parts) == unicodedata.normalize("NFC", text)
    return found


@pytest.mark.parametrize("kind", ["small", "others", pytest.param("real", marks=needs_data)])
@given(texts=st.lists(tricky_text, max_size=4), limits=st.tuples(*[st.integers(2, 24)] * 3))
@example(texts=["\u3000 the"], limits=(2, 2, 2))  # a character of three tokens before whitespace
@settings(max_examples=100, deadline=None)
def test_windows_cover_documents_within_limits(small, request, kind, texts, limits):
    others = (LLAMA, CHARACTERS, THIRD)
    tokenizers_ = {"small": small, "others": others}.get(kind) or request.getfixturevalue(kind)
    check_windows(texts, tokenizers_, limits[: len(tokenizers_)])


def test_windows_are_cut_before_whitespace_and_are_of_similar_size(small):
    found = check_windows([ENGLISH], small, (40, 40))
    assert not any(found.not_rebuilt)
    assert all(text_of(w, [ENGLISH])[0].isspace() for w in found.windows[1:])
    lengths = [max(len(tokens.ids) for tokens in window.tokens) for window in found.windows]
    assert min(lengths) >= 15
    found = check_windows([ENGLISH], [LLAMA], [40])  # full, although each invents a prefix
    total = sum(len(window.tokens[0].ids) for window in found.windows)
    assert len(found.windows) <= 1.25 * total / 40
    # A character too long for a window is dropped.
    found = check_windows(["the 😀 axis"], small, (3, 3))
    assert found.too_long == 1
    assert "".join(text_of(w, ["the 😀 axis"]) for w in found.windows) == "the  axis"
    refused("window_tokens", pairing.windows, ["the"], small, limits=(1, 8))

"""Documents: sources agree, splits are pure functions of hashes, mistakes get one line."""

import hashlib
import json
import re
import unicodedata
from dataclasses import replace
from functools import partial

import pyarrow
import pyarrow.parquet
import pytest
from tiny_run import refused, write_rows

from crossdict_jax.activations import docstrings
from crossdict_jax.activations.text import SPLITS, cut, load_corpus, split_of
from crossdict_jax.config import TextConfig

STORIES = [f"Story {i}: once upon a time there were {i} cats\nand a dog." for i in range(60)]


def load(source, **settings_):
    return load_corpus(TextConfig(source=str(source), **settings_))


def test_splits_are_pure_functions_of_hashes_with_the_asked_shares():
    split = partial(split_of, text=TextConfig())
    # Models and results made earlier rest on these.
    assert list(map(split, ("ast", "é", "json"))) == ["train", "validation", "test"]
    splits = [split(f"key {i}") for i in range(5000)]
    for name, share in zip(SPLITS, (0.7, 0.1, 0.2)):
        assert abs(splits.count(name) / len(splits) - share) < 0.02


def test_cut_prefers_the_last_whitespace():
    assert cut("one two three", max_bytes=9) == cut("one two three", max_bytes=7) == "one two"
    assert cut("one twothreefour", max_bytes=12) == "one twothree"  # a space would cost too much
    assert cut("日本語", max_bytes=8) == "日本"


@pytest.fixture
def sources(tmp_path):
    """The same stories as every kind of source."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, story in enumerate(STORIES):
        (folder / f"{i:03d}.txt").write_text(story)
    (folder / "README.md").write_text("not a document")
    dataset, rows = tmp_path / "dataset", tmp_path / "rows.parquet"
    dataset.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"story": STORIES}), dataset / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": STORIES}), rows)
    return {
        "folder": folder,
        "jsonl": write_rows(tmp_path / "rows.jsonl", [{"id": 1, "text": s} for s in STORIES]),
        "parquet": rows,
        "dataset": f"hf:{dataset}:::story",
    }


def test_every_source_gives_the_same_documents_and_splits(sources):
    corpora = {name: load(source) for name, source in sources.items()}
    expected = [(d.text, d.split) for d in corpora["jsonl"]]
    assert sorted(text for text, _ in expected) == sorted(STORIES)
    for corpus in corpora.values():
        assert [(d.text, d.split) for d in corpus] == expected
        assert corpus.provenance["sha256"] == corpora["jsonl"].provenance["sha256"]
    names = {name: {d.name for d in corpus} for name, corpus in corpora.items()}
    assert names["folder"] == {f"{i:03d}.txt" for i in range(60)}
    assert names["dataset"] == {f"dataset:{i}" for i in range(60)}
    for kind in ("jsonl", "parquet"):
        assert names[kind] == {f"rows.{kind}:{i}" for i in range(1, 61)}
    corpus = load(sources["parquet"], documents=40, validation_fraction=0.4)  # before the split
    assert sorted((d.text for d in corpus), key=STORIES.index) == STORIES[:40]
    assert len(corpus.split("validation")) > 8
    for split in SPLITS:
        order = [STORIES.index(d.text) for d in corpus.split(split)]
        assert order == sorted(order) and order


def test_what_is_done_to_documents_is_counted(tmp_path):
    extra = ["cafe\u0301", "caf\u00e9", " \n", None, STORIES[3], "x " * 2000]
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"text": text} for text in STORIES + extra])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark is no text
    corpus = load(path)
    provenance = corpus.provenance
    counted = ("changed_by_nfc", "duplicates", "blank", "cut_to_max_bytes")
    assert [provenance[key] for key in counted] == [1, 2, 2, 1]
    assert provenance["documents"] == {split: len(corpus.split(split)) for split in SPLITS}
    sizes = {s: [len(d.text.encode()) for d in corpus.split(s)] for s in SPLITS}
    assert provenance["bytes"] == {split: sum(size) for split, size in sizes.items()}
    assert max(len(d.text.encode()) for d in corpus) <= 2048
    assert all(unicodedata.is_normalized("NFC", d.text) for d in corpus)
    assert json.loads(json.dumps(provenance)) == provenance


def test_documents_equal_after_the_cut_are_duplicates_and_splits_are_of_the_whole(tmp_path):
    rows = [{"text": s} for s in STORIES] + [{"text": f"same head {i}"} for i in range(50)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    long, short = load(path), load(path, max_bytes=9)
    texts = [d.text for d in short]
    assert texts.count("same head") == 1 and len(set(texts)) == len(texts)
    splits = {d.name: d.split for d in long}
    assert all(splits[d.name] == d.split for d in short)


def test_one_text_file_is_cut_at_blank_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(STORIES) + "\n\n" + "endless " * 400)
    corpus = load(path, max_bytes=500)
    pieces = sorted(corpus, key=lambda d: int(d.name.split(":")[1]))
    assert all(len(d.text.encode()) <= 500 for d in pieces)
    assert pieces[0].text.startswith(STORIES[0]) and pieces[0].text.endswith("a dog.")
    assert len(pieces[0].text) > 400 and corpus.provenance["cut_to_max_bytes"] == 0
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # as Windows writes it
    assert load(path, max_bytes=500).provenance == corpus.provenance


ROWS = b"".join(json.dumps({"text": s}).encode() + b"\n" for s in STORIES)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "is no file: give"),
        ("empty.txt", b"", "empty file"),
        ("blank.txt", b" \n\n \n", "gave 0 documents"),
        ("few.jsonl", b"".join(ROWS.splitlines(True)[:2]), "split"),
        ("book.txt", ROWS, r"split test; lower text\.max_bytes=2048, the length"),
        ("rows.csv", b"text\n", r"\.txt \.jsonl \.parquet"),
        ("column.jsonl", ROWS + b'{"id": 1, "body": "x"}\n', "line 61 .*'text'.*'id', 'body'"),
        ("type.jsonl", ROWS + b'{"text": 5}\n', "line 61.*int"),
        ("list.jsonl", ROWS + b"[1]\n", "line 61 is a JSON list"),
        ("broken.jsonl", ROWS + b'{"text": "x\n', "line 61 is not JSON"),
        ("latin.jsonl", ROWS + b'{"text": "\xe9"}\n', "line 61 is not UTF-8 .byte 0xe9"),
        ("latin.txt", b"caf\xe9 one two", "not UTF-8 .byte 0xe9 at offset 3"),
        ("surrogate.jsonl", ROWS + b'{"text": "\\ud800"}\n', "line 61.*surrogate"),
        ("broken.parquet", b"PAR1 nothing", "not a parquet file"),
        ("folder", None, "folder holds no file ending in"),
    ],
)
def test_unreadable_files_get_one_line(tmp_path, name, content, message):
    if name == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    assert name in refused(message, load, tmp_path / name)


def test_unreadable_datasets_get_one_line(tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"text": s} for s in STORIES])
    refused("must be hf:NAME", load, "hf:")
    refused("nobody/no-such-dataset.*the network", load, "hf:nobody/no-such-dataset")  # offline
    refused("no-config.*Available", load, f"hf:{tmp_path}:no-config")
    refused("no column 'body': it has 'text'", load, f"hf:{tmp_path}:::body")
    refused("cannot be read", load, f"hf:{tmp_path}/nowhere")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "link").symlink_to(tmp_path)
    refused("holds a link to a folder, .*link, which is not", load, tmp_path / "more")


def test_settings_that_leave_nothing_are_refused(sources, tmp_path):
    refused(r"in the split (validation|test)", load, sources["jsonl"], documents=3)
    (tmp_path / "book.txt").write_text("日本語 " * 50)
    refused("too small for one character", load, tmp_path / "book.txt", max_bytes=2)


def read(folder, sources):
    """Writes sources as modules; returns the documents' texts by name."""
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    return dict(docstrings.module_texts([("", folder)]))


LONG = "This sentence explains at some length what the function computes and when to call it."
OTHER = "Nothing of this paragraph can be found anywhere else, which makes it worth reading twice."
THIRD = "A third one says which errors are raised, and why one should not try to catch any of them."


def document(*paragraphs, indent=""):
    body = "\n\n".join(paragraphs).replace("\n", "\n" + indent)
    return f'{indent}"""{body}\n{indent}"""\n'


def test_docstrings_are_read_in_order_and_never_imported(tmp_path):
    source = document(LONG) + "raise SystemExit\nclass A:\n" + document(OTHER, indent="    ")
    source += "    async def f():\n" + document(THIRD, indent="        ")
    source += "if True:\n    def g():\n        'Only with one quote.'\n"
    source += "x = '''A string that is no docstring.'''\n"
    found = read(tmp_path, {"a": source})
    assert found["a"] == "\n\n".join([LONG, OTHER, THIRD, "Only with one quote."])


def test_code_tables_and_foreign_letters_are_left_out(tmp_path):
    table = "0.1 0.2 0.3\n0.4 0.5 0.6"
    code = "```python\nx = 1\n\ny = 2\n```"
    prompt = ">>> import numpy as np\n>>> np.ones(3)\narray([1., 1., 1.])"
    ruled = "Returns\n-------\nresult : float"
    foreign = "Это предложение написано по-русски."
    found = read(tmp_path, {"a": document(LONG, table, code, prompt, ruled, foreign, OTHER, THIRD)})
    assert found["a"] == "\n\n".join([LONG, ruled, OTHER, THIRD])


def test_a_repeated_paragraph_stays_with_the_smallest_hash(tmp_path):
    sources = {n: document(LONG.replace(" ", "\n", 4), OTHER + n, THIRD + n) for n in "abcdef"}
    sources["b"] = document(LONG, OTHER + "b", THIRD + "b")  # other line breaks
    found = read(tmp_path, sources)
    first = min(sources, key=lambda name: hashlib.sha256(name.encode()).digest()[8:])
    assert [name for name, text in found.items() if LONG in " ".join(text.split())] == [first]


def test_copies_short_documents_and_unparsable_modules_are_skipped(tmp_path):
    sources, rest = {}, f"{LONG}\n{OTHER}\n{THIRD}"
    for name in ("weights", "tokenizer"):
        sources[name] = document(f"Loads the {name} of the model from a given folder.\n{rest}")
    sources |= {"short": document("Of no use."), "broken": "def (:"}
    assert len(read(tmp_path, sources)) == 1  # one of the copies: nothing is left of the other


def normal_paragraphs(documents):
    parts = (part for d in documents for part in re.split(r"\n\s*\n", d.text))
    return {" ".join(part.split()) for part in parts if len(" ".join(part.split())) >= 40}


def test_installed_docstrings_make_a_corpus():
    settings = TextConfig(source="docstrings", documents=200, max_bytes=10**9)
    corpus = load_corpus(settings)
    assert len(corpus) == 200 and len({d.name.split(".")[0] for d in corpus}) > 10
    for d in corpus:
        assert d.split == split_of(d.name, settings) and len(d.text.encode()) >= 200
    assert {"python", "numpy", "transformers"} <= set(corpus.provenance["packages"])
    train, test = (normal_paragraphs(corpus.split(split)) for split in ("train", "test"))
    assert len(test) > 200 and not train & test
    more = {d.name: d for d in corpus}  # fewer documents are a part of more
    assert all(more[d.name] == d for d in load_corpus(replace(settings, documents=60)))

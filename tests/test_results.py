"""Result files: what is written is described, and what is read is what was described."""

import pytest
from tiny_run import ROOT, refused

from crossdict_jax import results, studies
from crossdict_jax.results import Column, Table
from crossdict_jax.workdir import Workdir, write_jsonl

studies.every()


@pytest.fixture
def work(tmp_path, monkeypatch) -> Workdir:
    columns = (Column("r2", "a score", interval=True), Column("kind", "of row", values=("a", "b")))
    monkeypatch.setitem(results.TABLES, "made-up/*.jsonl", Table("made-up/*.jsonl", "one", columns))
    return Workdir(tmp_path)


def test_rows_come_back_with_undefined_numbers_as_null(work):
    rows = [{"r2": float("nan"), "r2_low": 0.1, "kind": "a"}, {"r2": 1.0, "kind": None}]
    results.write(work, "made-up/x.jsonl", rows)
    assert results.read(work, "made-up/x.jsonl") == [rows[0] | {"r2": None}, rows[1]]
    assert results.read_if_there(work, "made-up/y.jsonl") == []
    with pytest.raises(ValueError, match=r"other.jsonl is no result file; there are .*transfer"):
        results.write(work, "other.jsonl", [])


@pytest.mark.parametrize(
    "row, words",
    [({"r3": 1}, "column 'r3'"), ({"kind_low": 1}, "kind_low"), ({"kind": "c"}, "a, b")],
)
def test_what_is_not_described_is_neither_written_nor_read(work, row, words):
    with pytest.raises(ValueError, match=words):
        results.write(work, "made-up/x.jsonl", [row])
    assert not work.result("made-up/x.jsonl").exists()
    write_jsonl(work.result("made-up/x.jsonl"), [row])
    refused(f"{words}.*run its stage again", results.read, work, "made-up/x.jsonl")


@pytest.mark.parametrize("file", results.TABLES)
def test_every_column_has_one_meaning(file):
    names = [name for column in results.TABLES[file].columns for name in column.names]
    assert len(names) == len(set(names))
    assert all(column.meaning for column in results.TABLES[file].columns)


def test_the_page_is_up_to_date():
    assert (ROOT / "crossdict_jax/docs/results.md").read_text(encoding="utf-8") == results.page()

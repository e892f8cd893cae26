"""Published numbers: found in the rows that are meant, and a miss is an exit code."""

import pytest
from tiny_run import refused, write_rows

from crossdict_jax.config.expectations import Expectation
from crossdict_jax.workdir import Workdir
from launch import command

ROWS = [
    {"map": "ridge", "pairing": "aligned", "ce": 3.0, "ce_clean": 2.5},
    {"map": "ridge", "pairing": "shuffled", "ce": 9.0, "ce_clean": 2.5},
    {"map": "mean", "pairing": "aligned", "ce": 7.0, "ce_clean": None},
    {"map": "mean", "pairing": "aligned", "ce": 8.0, "ce_clean": 2.0},
]


def expectation(**changes):
    usual = {"words": "stitched", "file": "causal.jsonl", "key": "ce", "low": 2.9, "high": 3.1}
    return Expectation(**(usual | {"published": "3.08", "source": "A et al."} | changes))


@pytest.fixture
def work(tmp_path):
    write_rows(tmp_path / "results/causal.jsonl", ROWS)
    return Workdir(tmp_path)


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ({"map": "ridge", "pairing": "aligned"}, "ce", 3.0),
        ({"map": "mean"}, "ce", 7.5),  # of several rows the mean
        ({"map": "ridge", "pairing": "aligned"}, "ce - ce_clean", 0.5),
        ({"map": "mean"}, "ce - ce_clean", 6.0),  # a row without one of them does not count
        ({"map": "mean", "ce": 7.0}, "ce_clean", None),
    ],
)
def test_the_number_of_the_rows_that_are_meant(where, key, value, work):
    assert expectation(where=where, key=key).obtained(work) == value


def test_a_number_that_is_not_there_is_told(work):
    refused("no row with map=mlp", expectation(where={"map": "mlp"}).obtained, work)
    refused("is missing", expectation(file="none.jsonl").obtained, work)


FILE = """
from crossdict_jax.config.expectations import Expectation

def get_expectations():
    return [Expectation("x", file="r.jsonl", key="v", low={low}, high=2, published="1", source="s")]
"""


def run(tmp_path, capfd, expect):
    def main(config, work):
        write_rows(work.result("r.jsonl"), [{"v": 1}])

    argv = ["test", "--models=a,b", f"--workdir={tmp_path}/run", f"--expect={expect}"]
    return command.execute(main, argv), capfd.readouterr()


@pytest.mark.parametrize(("low", "code"), [(0, 0), (1.5, 1)])
def test_the_exit_code_says_whether_all_were_met(low, code, tmp_path, capfd):
    file = tmp_path / "expected.py"
    file.write_text(FILE.format(low=low))
    got, streams = run(tmp_path, capfd, file)
    assert got == code
    assert ("MISSED" in streams.out) == bool(code) and f"{low} to 2" in streams.out


@pytest.mark.parametrize("expect", ["nowhere.py", "configs/quickstart.py"])
def test_a_file_that_expects_nothing_is_told_before_any_work(expect, tmp_path, capfd):
    code, streams = run(tmp_path, capfd, expect)
    assert code == 2 and len(streams.err.splitlines()) == 1 and not (tmp_path / "run").exists()

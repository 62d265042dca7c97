"""What the benchmarks share: rows with targets, and the runner that collects them."""

import subprocess
import sys

import pytest
from training_runs import ROOT


sys.path.append(str(ROOT / "benchmarks"))
import all as runner
from _table import ROWS_FILE, Row, show


def test_a_row_knows_whether_its_target_is_met():
    assert Row("a", "2 s", "1 s", 2.0, least=2).met
    assert not Row("a", "2 s", "1 s", 1.9, least=2).met
    assert Row("a", "2 s", "1 s", 1.05, most=1.05).met
    assert not Row("a", "2 s", "1 s", 1.06, most=1.05).met
    assert Row("a", "2 s", "1 s", 0.0).met
    assert Row("a", "2 s", "1 s", 1.0, least=0.5, most=2).target == "at least 0.5 and at most 2"


def test_missed_targets_are_marked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(ROWS_FILE, str(tmp_path / "rows"))
    show(
        [Row("fast", "2 s", "1 s", 2.0, least=1.5), Row("slow", "2 s", "3 s", 0.67, least=1), Row("any", "", "", 1.0)]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[-1].strip("| ") for line in lines[2:]] == ["met", "MISSED", ""]
    assert len((tmp_path / "rows").read_text().splitlines()) == 3


def test_quick_sizes_are_those_of_benchmarks_that_exist():
    assert set(runner.QUICK) <= set(runner.names())
    assert "soak" not in runner.names()


def collected(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "all.py"), "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    return done, done.stdout.split("== all")[-1]


def test_the_runner_collects_the_rows_of_all_and_goes_on_after_one_that_fails():
    done, table = collected("solvers", "mel", "--", "--charges=8")  # which mel.py does not know
    assert done.returncode == 1 and "error: mel failed" in done.stderr
    assert table.count("error after 18 calls") == 3


def test_a_benchmark_that_is_not_there():
    done, _ = collected("sovlers")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no benchmark sovlers; there are dataset,")


@pytest.mark.slow
@pytest.mark.parametrize("name", runner.names())
def test_every_benchmark_runs(name):
    done, table = collected(name)
    assert done.returncode == 0, done.stderr
    assert table.count("\n|") > 2 or name == "evaluation"

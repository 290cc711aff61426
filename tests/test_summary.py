"""What a partial run of the benches leaves of the rows that are there, and what a killed one leaves of its own."""

import importlib.util
import json
from pathlib import Path

import pytest


def load(stem: str):
    bench = Path(__file__).parents[1] / "bench"
    spec = importlib.util.spec_from_file_location(f"{stem}_of_bench", bench / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(bench)
        spec.loader.exec_module(module)
    return module


def test_a_partial_run_keeps_the_rows_it_did_not_measure(tmp_path):
    summary = load("summary")

    def row(baseline, microseconds):
        return {"op": "step", "baseline": baseline, "shape": "B/2", "microseconds": microseconds}

    path = tmp_path / "bench.json"
    assert summary.merged(path, [row("ours", 1)]) == [row("ours", 1)]
    path.write_text(json.dumps({"commit": "abc", "device": "a CPU", "rows": [row("ours", 1), row("theirs", 2)]}))
    assert summary.merged(path, [row("ours", 3)]) == [{"commit": "abc", "device": "a CPU"} | row("theirs", 2), row("ours", 3)]


def test_rows_are_on_disk_as_soon_as_their_bench_ends(tmp_path, monkeypatch):
    bench = load("conftest")
    monkeypatch.setattr(bench.summary, "RESULTS", tmp_path)
    monkeypatch.setattr(bench.summary.machine, "commit", lambda: "abc")
    for number, baseline in enumerate(("ours", "theirs"), 1):
        bench.STASH.rows.append(bench.Row("bench_step", "step", baseline, "B/2", 1.0, 3))
        bench.pytest_runtest_teardown()
        [path] = tmp_path.iterdir()
        found = json.loads(path.read_text())
        assert [row["baseline"] for row in found["rows"]] == ["ours", "theirs"][:number]
        assert found["commit"] == "abc"

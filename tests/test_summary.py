"""What a partial run of the benches leaves of the rows that are there."""

import importlib.util
import json
from pathlib import Path


def test_a_partial_run_keeps_the_rows_it_did_not_measure(tmp_path):
    spec = importlib.util.spec_from_file_location("summary", Path(__file__).parents[1] / "bench" / "summary.py")
    summary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(summary)

    def row(baseline, microseconds):
        return {"op": "step", "baseline": baseline, "shape": "B/2", "microseconds": microseconds}

    path = tmp_path / "bench.json"
    assert summary.merged(path, [row("ours", 1)]) == [row("ours", 1)]
    path.write_text(json.dumps({"commit": "abc", "rows": [row("ours", 1), row("theirs", 2)]}))
    assert summary.merged(path, [row("ours", 3)]) == [{"commit": "abc"} | row("theirs", 2), row("ours", 3)]

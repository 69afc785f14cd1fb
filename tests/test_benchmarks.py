"""The benchmarks run, and their last line is what a program would read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def last_line(script: str, *args: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / script), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_overhead():
    result = last_line("overhead.py", "--steps", "30")
    assert result["overhead_ms"] > 0 and result["overhead_16_ms"] > 0 and result["streamed_overhead_16_ms"] > 0
    assert [(row["outputs"], row["requests"]) for row in result["rows"]] == [
        ("at the end", 1), ("at the end", 16), ("streamed", 1), ("streamed", 16),
    ]  # fmt: skip


def test_strategies(tmp_path: Path):
    pytest.importorskip("matplotlib")
    result = last_line("strategies.py", "--quick", "--questions", "4", "--plot", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert result["dual_threshold_speedup"] > 0 and result["batch16_speedup"] > 0
    assert {"dual_threshold_accuracy_drop", "d2f_tokens_per_forward", "d2f_accuracy_drop"} <= set(result)
    none, dual = (
        next(
            row
            for row in result["rows"]
            if (row["decoder"], row["pace"]) == (cache, "one a step") and row["batch"] == 16
        )
        for cache in ("none", "dual")
    )
    assert 0 < none["tokens_per_forward"] <= 1 and dual["kv_blocks"] > 0
    assert all(0 <= share <= 1 for drifts in result["drift"].values() for share in drifts.values())


def test_fairness():
    result = last_line("fairness.py", "--quick")
    (row,) = result["beside"]
    assert row["answered"] == row["of"] == 3 and row["steps"] == 8
    assert row["heavy limit"] == pytest.approx(3 * row["alone"] + 8 * row["heavy step"])
    assert row["in heavy limit"] == (row["median"] <= row["heavy limit"])
    assert result["clients"]["timed out"] == 0 and result["clients"]["p99 / median"] >= 1
    assert [batch["batch"] for batch in result["throughput"]] == ["equal", "mixed"]
    assert all(batch["this tokens/s"] > 0 for batch in result["throughput"])
    assert result["compared_answers"] > 20 and result["changed_answers"] == 0


def test_the_documented_table_is_the_recorded_one():
    recorded = BENCHMARKS / "results" / "cpu-strategies.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "strategies.py"), "--table", str(recorded)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    table = done.stdout[done.stdout.index("| checkpoint |") :].strip()
    assert len(table.splitlines()) > 25
    assert table in (BENCHMARKS.parent / "docs" / "performance.md").read_text()

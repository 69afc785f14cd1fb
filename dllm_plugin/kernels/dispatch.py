"""Which implementation runs: the Triton kernel on CUDA tensors, the CPU path elsewhere.

`DLLM_PLUGIN_KERNELS=triton` or `=torch` overrides the choice for every operation; `torch` means the CPU path, which for
`unmask` is NumPy. vLLM's log shows the choice once for each device type. Without Triton the package still imports and the
CPU paths run.
"""

import functools
import logging
import os
from typing import NoReturn

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:  # a CPU installation needs no Triton

    class _Absent:
        """Stands in for `triton` and `tl` so that `@triton.jit` and `tl.constexpr` annotations still evaluate."""

        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, function: object) -> object:
            return function

    triton = tl = libdevice = TensorDescriptor = _Absent()
    HAS_TRITON = False

ENVIRONMENT = "DLLM_PLUGIN_KERNELS"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # that a float32 holds exactly: kernels compute in that
# Triton decides at decoration time whether a kernel is interpreted, so this is read once, at the same time.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"

logger = logging.getLogger("vllm." + __name__)


@functools.cache
def use_triton(device_type: str) -> bool:
    """Whether operations on tensors of this device type run as Triton kernels."""
    asked = os.environ.get(ENVIRONMENT, "")
    if asked not in ("", "triton", "torch"):
        raise ValueError(f"{ENVIRONMENT} must be 'triton' or 'torch', got {asked!r}; unset it to choose by device")
    if asked == "triton":
        if not HAS_TRITON:
            raise ValueError(f"{ENVIRONMENT}=triton, but triton is not installed; install triton or unset it")
        if device_type != "cuda" and not INTERPRETED:
            raise ValueError(
                f"{ENVIRONMENT}=triton, but the tensors are on {device_type!r} and Triton compiles for CUDA only; "
                "unset it, or set TRITON_INTERPRET=1 to interpret the kernels (slow, for tests)"
            )
    elif asked == "" and device_type == "cuda" and not HAS_TRITON:
        logger.warning("triton is not installed: the CPU paths run on CUDA, slowly; install triton")
    choice = asked == "triton" or (asked == "" and device_type == "cuda" and HAS_TRITON)
    reason = f"{ENVIRONMENT}={asked}" if asked else "chosen by device"
    logger.info("dllm_plugin kernels on %s: %s (%s)", device_type, "triton" if choice else "torch", reason)
    return choice


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; a small number where Triton is interpreted, so that tests split work too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def device_generation(device: torch.device) -> int:
    """Major compute capability: 8 for Ampere, 9 for Hopper, 10 for Blackwell. Interpreted kernels pass for Hopper's."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def refuse_devices(**tensors: Tensor) -> NoReturn:
    """Names a tensor that is not where the first one is. The caller has compared the devices, which costs less."""
    (name, first), *others = tensors.items()
    other, device = next((other, tensor.device) for other, tensor in others if tensor.device != first.device)
    raise ValueError(
        f"all tensors must be on one device, got {name} on '{first.device}' and {other} on '{device}'; "
        f"pass {other}.to('{first.device}')"
    )


def refuse(must: str, given: dict[str, Tensor], beside: dict[str, Tensor] | None = None, remedy: str = "") -> NoReturn:
    """Says what tensors must be and what was given, or which of them is not on the device of the one `beside` them."""
    tensors = (beside or {}) | given
    if len({tensor.device for tensor in tensors.values()}) > 1:
        refuse_devices(**tensors)
    was = " and ".join(f"{x.dtype} {list(x.shape)} with strides {x.stride()}" for x in given.values())
    raise ValueError(f"{must}, got {was}" + (remedy and f"; {remedy}"))


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The small per-row and per-request tensors as kernels index them: without strides."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]

"""Every kernel compiles to a binary for real GPUs, without spilling and within their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_plugin.kernels.window_attention import HEAD_SIZES

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# capability: bytes of shared memory a block may use
TARGETS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
KERNELS = {"attention_kernel", "combine_kernel", "part_kernel", "merge_kernel", "entropy_kernel", "unmask_kernel",
           "survey_kernel", "select_kernel", "_route_kernel",
           "_store_kv_kernel", "_rms_norm_kernel", "_rotate_kernel", "_head_norm_kernel", "_gated_silu_kernel"}  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "only"), [(80, ""), (90, ""), (100, "attention")], ids=["sm_80", "sm_90", "sm_100 attention"]
)
def test_compiles_without_spills(capability, only, tmp_path):
    # A process of its own: here Triton interprets.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, SCRIPT, str(capability), only], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    expected = {"attention_kernel", "combine_kernel"} if only else KERNELS
    assert {kernel["kernel"] for kernel in compiled} == expected | ({"_hopper_kernel"} if capability == 90 else set())
    heads = {int(kernel["arguments"][0]) for kernel in compiled if kernel["kernel"] == "attention_kernel"}
    assert heads == set(HEAD_SIZES)
    for kernel in compiled:
        # These two keep a few scalars on the stack while their loops run.
        allowed = 32 if kernel["kernel"] in ("_hopper_kernel", "select_kernel") else 0
        assert kernel["stack"] <= allowed and kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= TARGETS[capability], kernel
        assert kernel["reg"] * 32 * kernel["num_warps"] <= 65_536, kernel

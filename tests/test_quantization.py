"""vLLM's own quantization serves every kind of family: 8-bit weights and activations, in the compressed-tensors format."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.engines import model_runner, new_engine
from vllm import SamplingParams
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_int8 as int8_experts,
)

from dllm_plugin.checkpoints import path
from dllm_plugin.checkpoints.tasks import questions
from dllm_plugin.models import experts

# matrices that keep their dtype, as the checkpoints call them; the last one is the head
UNQUANTIZED = {
    "tiny-llada": ("wte", "model.transformer.ff_out"),
    "tiny-dream": ("embed_tokens", "lm_head"),
    "tiny-sdar": ("embed_tokens", "lm_head"),
    "tiny-llada2": ("word_embeddings", "mlp.gate", "lm_head"),
}
EXPERTS = r"re:.*\.mlp\.experts\..*"
CACHED = {"block_length": 8, "threshold": 0.9, "cache": "dual"}
EXTRAS = {
    "tiny-llada": CACHED,
    "tiny-dream": CACHED,
    "tiny-sdar": {"threshold": 0.9},
    "tiny-llada2": {"threshold": 0.9},
}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 and the scale of each row."""
    scale = weight.float().abs().amax(-1, keepdim=True).clamp_min(1e-10) / 127
    return (weight.float() / scale).round().to(torch.int8), scale


def quantize(name: str, folder: Path, leave_out: str = "", ignore: str = "") -> Path:
    """A bundled checkpoint with int8 weights, one scale a row, as llm-compressor writes it.

    ``leave_out``: a tensor that is missing. ``ignore``: modules that are not quantized beside the head.
    """
    shutil.copytree(path(name), folder)
    *_, head = kept = UNQUANTIZED[name]
    tensors = {}
    for tensor_name, weight in load_file(folder / "model.safetensors").items():
        module = tensor_name.removesuffix(".weight")
        ignored = ignore and re.fullmatch(ignore.removeprefix("re:"), module)
        if weight.dim() == 2 and not module.endswith(kept) and not ignored:
            weight, tensors[f"{module}.weight_scale"] = to_int8(weight)
        tensors[tensor_name] = weight
    tensors.pop(leave_out, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    scheme = {
        "targets": ["Linear"],
        "weights": INT8 | {"strategy": "channel", "dynamic": False},
        "input_activations": INT8 | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": [head, *([ignore] if ignore else [])],  # the checkpoint's own names
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def answers_are_right(llm, extras: dict) -> None:
    """Nearly all of them, and the same alone and together."""
    asked = questions("held_out", 60, seed=3)
    chats = [[{"role": "user", "content": question.text}] for question in asked]
    params = SamplingParams(
        temperature=0, max_tokens=32, extra_args={f"diffusion_{name}": value for name, value in extras.items()}
    )
    together = [output.outputs[0].text for output in llm.chat(chats, params, use_tqdm=False)]
    alone = [llm.chat(chat, params, use_tqdm=False)[0].outputs[0].text for chat in chats[:8]]
    assert together[:8] == alone
    right = sum(text == question.answer for text, question in zip(together, asked, strict=True))
    assert right / len(asked) >= 0.85, f"{right} of {len(asked)}"  # 8 bits cost models this small some answers


@pytest.mark.parametrize("name", UNQUANTIZED)
def test_answers_with_8_bits(name: str, tmp_path: Path):
    """Of LLaDA2 all but the experts, which a CPU has in the model's dtype only."""
    llm = new_engine(quantize(name, tmp_path / name, ignore=EXPERTS), dtype="auto")
    first, block, head = *model_runner(llm).model.decoder.blocks[:2], model_runner(llm).model.decoder.head
    linears = [block.qkv_proj, block.o_proj, first.mlp.gate_up_proj, first.mlp.down_proj]
    if name == "tiny-llada2":
        linears += [block.mlp.shared.gate_up_proj, block.mlp.shared.down_proj]
        assert block.mlp.experts.w13_weight.dtype == torch.bfloat16
    assert {type(linear.quant_method).__name__ for linear in linears} == {"CompressedTensorsLinearMethod"}
    assert head.weight.dtype == torch.bfloat16
    answers_are_right(llm, EXTRAS[name])


def test_a_missing_tensor_is_named(tmp_path: Path):
    missing = "model.layers.2.mlp.up_proj.weight"
    folder = quantize("tiny-dream", tmp_path / "incomplete", leave_out=missing)
    with pytest.raises(ValueError, match=f"lacks 1 of its tensors: {missing}"):
        new_engine(folder, dtype="auto")


# ---- experts


def test_quantized_experts_on_a_cpu_are_refused(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"'compressed-tensors' includes those of decoder\.blocks\.1\.mlp\.experts; serve"
    ):
        new_engine(quantize("tiny-llada2", tmp_path / "experts"), dtype="auto")


class PlainInt8Experts(CPUExpertsInt8):
    """Stands in for vLLM's kernels, of which none runs on every CPU: int8 weights and rows, one expert after another."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None: ...  # nothing is packed

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *_, **__) -> None:
        output.zero_()
        for expert in topk_ids.unique().tolist():
            tokens, place = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = self.product(hidden_states[tokens], w1[expert], self.w1_scale[expert]).chunk(2, dim=-1)
            rows = self.product(F.silu(gate) * up, w2[expert], self.w2_scale[expert])
            output[tokens] += (rows * topk_weights[tokens, place, None]).to(output.dtype)

    @staticmethod
    def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        rows, row_scale = to_int8(x)
        return (rows.double() @ weight.double().T).float() * row_scale * scale.view(1, -1)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """vLLM's layer of experts is taken as on a GPU, and no kernel but a plain one."""

    class Platform:
        is_cpu = staticmethod(lambda: False)

    monkeypatch.setattr(experts, "current_platform", Platform)
    monkeypatch.setattr(int8_experts, "select_int8_moe_backend", lambda **_: (Int8MoeBackend.CPU, PlainInt8Experts))


def test_quantized_experts_are_vllms_layer(as_on_a_gpu, tmp_path: Path):
    """Its weights and scales are the checkpoint's, the router's choice is ours, and the model answers."""
    folder = quantize("tiny-llada2", tmp_path / "experts")
    llm = new_engine(folder, dtype="auto")
    layer = model_runner(llm).model.decoder.blocks[1].mlp.experts.routed_experts
    assert type(layer.quant_method).__name__ == "CompressedTensorsW8A8Int8MoEMethod"
    tensors = load_file(folder / "model.safetensors")
    for name, shards in (("w13", ("gate_proj", "up_proj")), ("w2", ("down_proj",))):
        for kind in ("weight", "weight_scale"):
            for expert in (0, 7, 15):
                stored = [tensors[f"model.layers.1.mlp.experts.{expert}.{shard}.{kind}"] for shard in shards]
                assert torch.equal(getattr(layer, f"{name}_{kind}")[expert], torch.cat(stored))
    answers_are_right(llm, EXTRAS["tiny-llada2"])


def test_a_missing_expert_is_named(as_on_a_gpu, tmp_path: Path):
    missing = "model.layers.2.mlp.experts.5.up_proj.weight"
    folder = quantize("tiny-llada2", tmp_path / "incomplete", leave_out=missing)
    with pytest.raises(ValueError, match=f"lacks 1 of its tensors: {missing}"):
        new_engine(folder, dtype="auto")


def test_adapters_beside_quantized_experts_are_refused(as_on_a_gpu, tmp_path: Path):
    folder = quantize("tiny-llada2", tmp_path / "experts")
    with pytest.raises(ValueError, match="experts exclude each other; remove --enable-lora"):
        new_engine(folder, dtype="auto", enable_lora=True)

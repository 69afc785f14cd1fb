"""What checkpoints call the decoder's tensors."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vllm.model_executor.models.utils import WeightsMapper

# of a projection, or of one of all experts: (expert, or None for all of them in one tensor; vLLM's name of the projection)
Shard = int | str | tuple[int | None, str] | None
# of a stacked projection; adapters and quantization configs name its shards so
SHARD_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", 0: "gate_proj", 1: "up_proj"}


@dataclass(frozen=True)
class WeightNames:
    """What a family's checkpoint calls the decoder's modules, as (our module, shard of it) for each of its modules.

    ``layer``: what stands before a block's number. ``in_layer``: modules of a block, with a star for an expert's number.
    ``outside``: all others.
    """

    layer: str
    in_layer: dict[str, tuple[str, int | str | None]]
    outside: dict[str, str]

    def locate(self, name: str) -> tuple[str, Shard]:
        """Our parameter and the shard of it that the checkpoint's tensor ``name`` holds; ("", None) if unknown."""
        module, _, kind = name.rpartition(".")
        if not (match := re.fullmatch(rf"{re.escape(self.layer)}\.(\d+)\.(.+)", module)):
            return (f"{self.outside[module]}.{kind}", None) if module in self.outside else ("", None)
        block, leaf = f"blocks.{match[1]}", match[2]
        if place := self.in_layer.get(f"{leaf}.*.{kind}"):  # of all experts, without ".weight" (inclusionAI/dFactory)
            return f"{block}.{place[0]}_weight", (None, str(place[1]))
        expert = re.fullmatch(r"(.+)\.(\d+)\.(.+)", leaf)
        target, shard = self.in_layer.get(f"{expert[1]}.*.{expert[3]}" if expert else leaf, ("", None))
        if not target:
            return "", None
        return (
            (f"{block}.{target}_{kind}", (int(expert[2]), str(shard)))
            if expert
            else (f"{block}.{target}.{kind}", shard)
        )

    @property
    def mapper(self) -> WeightsMapper:
        """The same mapping for vLLM, which renames the modules that adapters and quantization configs speak of.

        A shard of a stacked projection keeps a name of its own there (``q_proj``), as `packed_modules_mapping` lists, and so
        does the projection of an expert (``experts.3.up_proj``).
        """
        patterns = {
            rf"^{re.escape(self.layer)}\.(\d+)\.{re.escape(leaf)}(?=\.|$)": (
                rf"decoder.blocks.\1.{self._module_of_shard(ours, shard)}"
            )
            for leaf, (ours, shard) in self.in_layer.items()
            if "*" not in leaf
        }
        patterns |= {rf"^{re.escape(module)}(?=\.|$)": f"decoder.{ours}" for module, ours in self.outside.items()}
        return WeightsMapper(orig_to_new_regex={re.compile(pattern): new for pattern, new in patterns.items()})

    @staticmethod
    def _module_of_shard(ours: str, shard: int | str | None) -> str:
        parent, dot, _ = ours.rpartition(".")
        return ours if shard is None else f"{parent}{dot}{SHARD_NAMES[shard]}"

    def tensors_of(self, num_layers: int, experts: Iterable[int] = ()) -> Iterable[str]:
        """Every name `locate` knows, weights and biases alike, with a tensor for each of the ``experts``."""
        leaves = [leaf for leaf in self.in_layer if "*" not in leaf]
        leaves += [leaf.replace("*", str(expert)) for leaf in self.in_layer if "*" in leaf for expert in experts]
        modules = [*self.outside, *(f"{self.layer}.{i}.{leaf}" for i in range(num_layers) for leaf in leaves)]
        return (f"{module}.{kind}" for module in modules for kind in ("weight", "bias", "expert_bias"))


ATTENTION: dict[str, tuple[str, int | str | None]] = {
    "input_layernorm": ("input_norm", None),
    "self_attn.q_proj": ("qkv_proj", "q"),
    "self_attn.k_proj": ("qkv_proj", "k"),
    "self_attn.v_proj": ("qkv_proj", "v"),
    "self_attn.q_norm": ("q_norm", None),
    "self_attn.k_norm": ("k_norm", None),
    "self_attn.o_proj": ("o_proj", None),
    "post_attention_layernorm": ("post_attention_norm", None),
}
DENSE_MLP: dict[str, tuple[str, int | str | None]] = {
    "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", 1),
    "mlp.down_proj": ("mlp.down_proj", None),
}
EXPERTS: dict[str, tuple[str, int | str | None]] = {
    "mlp.gate": ("mlp.router", None),
    "mlp.experts.*.gate_proj": ("mlp.experts.w13", "w1"),
    "mlp.experts.*.up_proj": ("mlp.experts.w13", "w3"),
    "mlp.experts.*.down_proj": ("mlp.experts.w2", "w2"),
}
# of Llama and Qwen, with biases, norms of heads and experts where a family has them
LLAMA = WeightNames(
    layer="model.layers",
    in_layer=ATTENTION | DENSE_MLP | EXPERTS,
    outside={"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"},
)

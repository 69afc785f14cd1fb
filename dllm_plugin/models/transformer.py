"""The decoder all families share, over vLLM's parallel layers: pre-norm blocks, gated MLP or experts, windowed attention.

What differs between families is a `Shape`; what a checkpoint calls its tensors is a `WeightNames`. RMSNorm, RoPE and the
gated activation are our own because vLLM's fused ones round at other places than the reference code, and a token is
decided by the last bit of a confidence.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from dllm_plugin.attention import DiffusionAttention
from dllm_plugin.finite import is_finite
from dllm_plugin.kernels.gated_silu import gated_silu
from dllm_plugin.kernels.head_norm import head_norm
from dllm_plugin.kernels.rms_norm import rms_norm
from dllm_plugin.kernels.rotary import rotate
from dllm_plugin.models.configs import DiffusionConfig
from dllm_plugin.models.experts import Experts, ExpertsShape, experts_of_rank
from dllm_plugin.models.names import Shard, WeightNames


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder, and the choices that differ between families."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rotary_size: int  # the first dimensions of a head, which positions rotate
    intermediate_size: int
    num_embeddings: int  # and columns of the logits, those that pad the vocabulary among them
    norm_eps: float
    rope_theta: float
    qkv_bias: bool
    qk_norm: bool  # of each head, before it is rotated
    tie_embeddings: bool
    # LLaDA rotates q and k in float32; the others round cos and sin to the activations' dtype first
    rope_in_float32: bool
    experts: ExpertsShape | None = None
    sparse_layers: frozenset[int] = frozenset()  # those whose MLP is experts

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts if self.experts else 0

    def tensor_shape(self, target: str, shard: Shard) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor for a parameter of the decoder, or for a shard of it."""
        *path, module, kind = target.split(".")
        width = self.intermediate_size
        if self.experts is not None and isinstance(shard, tuple):
            width = self.experts.intermediate_size
            shape = (self.hidden_size, width) if shard[1] == "w2" else (width, self.hidden_size)
            return shape if shard[0] is not None else (self.num_experts, *shape)
        if module == "router":
            return (self.num_experts,) if kind == "expert_bias" else (self.num_experts, self.hidden_size)
        if module in ("q_norm", "k_norm"):
            return (self.head_size,)
        if self.experts is not None and "shared" in path:
            width = self.experts.shared_size
        heads: dict[Any, int] = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
        rows = {
            "embedding": self.num_embeddings,
            "head": self.num_embeddings,
            "gate_up_proj": width,
            "qkv_proj": self.head_size * heads.get(shard, sum(heads.values())),
        }.get(module, self.hidden_size)
        columns = {"down_proj": width, "o_proj": self.head_size * self.num_heads}.get(module, self.hidden_size)
        return (rows,) if kind == "bias" or module.endswith("norm") else (rows, columns)


class RMSNorm(nn.Module):
    """The norm of ``x``, or of ``x + residual``, and what it is the norm of; `rms_norm` says where it rounds."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm(x, self.weight, self.eps, residual)


def rotary_angles(positions: torch.Tensor, rotary_size: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 ``[tokens, 1, rotary_size]``, both halves alike (NeoX layout)."""
    exponent = torch.arange(0, rotary_size, 2, dtype=torch.float32, device=positions.device) / rotary_size
    angle = positions.float()[:, None] * (1.0 / theta**exponent)
    angle = torch.cat((angle, angle), dim=-1)[:, None, :]
    return angle.cos(), angle.sin()


class GatedMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, [intermediate_size] * 2, bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            intermediate_size, hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated_silu(self.gate_up_proj(x)[0]))[0]


class Block(nn.Module):
    def __init__(self, shape: Shape, vllm_config: VllmConfig, prefix: str, sparse: bool) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        size, head_size = shape.hidden_size, shape.head_size
        world_size = get_tensor_model_parallel_world_size()
        self.head_size = head_size
        self.num_heads = shape.num_heads // world_size
        self.num_kv_heads = max(1, shape.num_kv_heads // world_size)
        self.input_norm = RMSNorm(size, shape.norm_eps)
        self.qkv_proj = QKVParallelLinear(
            size,
            head_size,
            shape.num_heads,
            shape.num_kv_heads,
            bias=shape.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.attention = DiffusionAttention(
            self.num_heads, self.num_kv_heads, head_size, vllm_config, prefix=f"{prefix}.attention"
        )
        self.q_norm = RMSNorm(head_size, shape.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(head_size, shape.norm_eps) if shape.qk_norm else None
        self.o_proj = RowParallelLinear(
            shape.num_heads * head_size, size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.post_attention_norm = RMSNorm(size, shape.norm_eps)
        self.mlp: nn.Module
        if sparse and (experts := shape.experts) is not None:
            shared = experts.shared_size and GatedMLP(size, experts.shared_size, quant_config, f"{prefix}.mlp.shared")
            self.mlp = Experts(size, experts, shared or None, vllm_config, f"{prefix}.mlp")
        else:
            self.mlp = GatedMLP(size, shape.intermediate_size, quant_config, f"{prefix}.mlp")

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and residual, as yet apart: the next norm adds them. The first block's input has no residual."""
        x, residual = self.input_norm(x, residual)
        x, residual = self.post_attention_norm(self.attend(x, cos, sin), residual)
        return self.mlp(x), residual

    def attend(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(x)
        heads = qkv.view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_size)
        values = heads[:, -self.num_kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            weights = self.q_norm.weight, self.k_norm.weight
            heads = head_norm(heads, self.num_heads, self.num_kv_heads, *weights, self.q_norm.eps)
        q, k = rotate(heads, self.num_heads, self.num_kv_heads, cos, sin)
        return self.o_proj(self.attention(q, k, values).flatten(1))[0]


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head of a bidirectional decoder."""

    def __init__(self, shape: Shape, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.shape = shape
        quant_config = vllm_config.quant_config
        self.embedding = VocabParallelEmbedding(
            shape.num_embeddings, shape.hidden_size, quant_config=quant_config, prefix=f"{prefix}.embedding"
        )
        self.blocks = nn.ModuleList(
            Block(shape, vllm_config, prefix=f"{prefix}.blocks.{i}", sparse=i in shape.sparse_layers)
            for i in range(shape.num_layers)
        )
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        if shape.tie_embeddings:
            self.head = self.embedding
        else:
            self.head = ParallelLMHead(
                shape.num_embeddings, shape.hidden_size, quant_config=quant_config, prefix=f"{prefix}.head"
            )
        self.logits_processor = LogitsProcessor(shape.num_embeddings)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states ``[tokens, hidden_size]`` after the final norm."""
        x, residual = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds, None
        cos, sin = rotary_angles(positions, self.shape.rotary_size, self.shape.rope_theta)
        if not self.shape.rope_in_float32:
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for block in self.blocks:
            x, residual = block(x, residual, cos, sin)
        return self.norm(x, residual)[0]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits_processor(self.head, hidden_states)


class DiffusionLM(nn.Module, SupportsLoRA):
    """What vLLM asks of a model, for a family given by its tensor ``names`` and the `Shape` its config describes.

    ``qkv_bias``, ``qk_norm``, ``rope_in_float32``: as in `Shape`, where a family's config.json does not say.
    """

    names: WeightNames
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False
    rope_in_float32: ClassVar[bool] = False
    hf_to_vllm_mapper: WeightsMapper
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {  # type: ignore[misc]  # vLLM means one, and writes no ClassVar
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init_subclass__(cls) -> None:
        cls.hf_to_vllm_mapper = cls.names.mapper

    @classmethod
    def shape_of(cls, config: DiffusionConfig) -> Shape:
        return Shape(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_size=config.head_size,
            rotary_size=config.rotary_size,
            intermediate_size=config.intermediate_size,
            num_embeddings=config.num_embeddings,
            norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            qkv_bias=cls.qkv_bias,
            qk_norm=cls.qk_norm,
            tie_embeddings=config.tie_word_embeddings,
            rope_in_float32=cls.rope_in_float32,
        )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.quant_config = vllm_config.quant_config
        self.config = cast(DiffusionConfig, vllm_config.model_config.hf_config)  # vLLM's LoRA manager reads it
        shape = self.shape_of(self.config)
        self.experts = experts_of_rank(shape.num_experts, vllm_config)  # that must be loaded
        self.not_finite: list[str] = []  # of the checkpoint's tensors
        self.decoder = Decoder(shape, vllm_config, prefix=maybe_prefix(prefix, "decoder"))

    @property
    def num_embeddings(self) -> int:
        """Columns of the logits."""
        return self.decoder.shape.num_embeddings

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.decoder.embedding(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.decoder(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the names of the parameters that were loaded.

        Those that hold NaN or infinity are named in `not_finite`; later a backend may pack them out of sight. Raises ValueError
        naming the tensor where one is surplus, has the wrong shape or dtype, or is missing.
        """
        # layers with adapters, and vLLM's layer of experts, keep what was loaded under another name
        parameters = {
            name.replace(".base_layer.", ".").replace(".routed_experts.", "."): parameter
            for name, parameter in self.decoder.named_parameters()
        }
        shape, loaded = self.decoder.shape, set[tuple[str, Shard]]()
        self.not_finite.clear()
        for name, tensor in weights:
            target, shard = self.names.locate(name)
            if shape.tie_embeddings and target.startswith("head."):
                continue  # a tied head, stored all the same
            experts = [shard[0]] if isinstance(shard, tuple) and shard[0] is not None else range(shape.num_experts)
            if target not in parameters or any(expert >= shape.num_experts for expert in experts):
                raise ValueError(f"the checkpoint holds a tensor that {type(self).__name__} does not have: {name}")
            if self.quant_config is None and not tensor.is_floating_point():
                raise ValueError(
                    f"tensor {name} has dtype {tensor.dtype}, and config.json names no quantization; take the published "
                    "checkpoint, or the quantization_config that belongs to this one"
                )
            # vLLM's loaders would cut a tensor that is too large
            if self.quant_config is None and tensor.shape != (asked := shape.tensor_shape(target, shard)):
                raise ValueError(
                    f"tensor {name} has shape {tuple(tensor.shape)}, and config.json asks for {asked}; the checkpoint and "
                    "its config.json do not belong together"
                )
            param: Any = parameters[target]
            if not is_finite(tensor if param.is_meta else tensor.to(param.device)):
                self.not_finite.append(name)
            if isinstance(shard, tuple):
                for expert, part in zip(experts, [tensor] if shard[0] is not None else tensor, strict=True):
                    param.weight_loader(param, part, weight_name=target, shard_id=shard[1], expert_id=expert)
                    loaded.add((target, (expert, shard[1])))
            else:
                load = getattr(param, "weight_loader", default_weight_loader)
                load(param, tensor, *(() if shard is None else (shard,)))
                loaded.add((target, shard))
        # where a quantization method stores a weight under another name, no parameter has this one
        names = self.names.tensors_of(shape.num_layers, self.experts)
        expected = {name: self.names.locate(name) for name in names}
        missing = [n for n, place in expected.items() if place[0] in parameters and place not in loaded]
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} of its tensors: {', '.join(missing[:8])}")
        return {f"decoder.{target}" for target, _ in loaded}

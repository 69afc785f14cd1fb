"""Experts of a layer, and the routers that choose among them.

Routers compute in float32 and are exact: among equal scores the lowest expert comes first, which `torch.topk` does not promise.
Every rank of a tensor-parallel group has a share of every expert's intermediate size. The experts' weights keep the
model's dtype whatever quantizes the layers beside them.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.utils import set_weight_attrs

from dllm_plugin.kernels.gated_silu import gated_silu

_ROWS = 4  # a row of a product of fewer has other bits on a CPU (MKL), and how many an expert gets is up to the batch


@dataclass(frozen=True)
class SoftmaxRouting:
    """The best of a softmax over all experts, rounded to the logits' dtype (OLMoE's and Qwen3-MoE's).

    Source: yjyddq/DARE:models/SDAR-30B-A3B-Chat/modeling_sdar_moe.py, InfiniTensor/InfiniLM:modeling_lladamoe.py.
    """

    top_k: int
    normalized: bool  # the weights of a token sum to 1
    in_float32: ClassVar[bool] = False  # the logits are
    has_bias: ClassVar[bool] = False

    def choose(self, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights, of the dtype of ``logits`` [tokens, experts], and int64 experts, both [tokens, top_k]."""
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
        chosen = best(scores, self.top_k)
        weights = scores.gather(1, chosen)
        if self.normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(logits.dtype), chosen


@dataclass(frozen=True)
class GroupedSigmoidRouting:
    """The best of the best groups by sigmoid plus a bias, which has no part in the weights.

    A group, of experts side by side, is worth the sum of its two best biased scores.
    Source: yjyddq/DARE:models/LLaDA2.0-mini/modeling_llada2_moe.py.
    """

    top_k: int
    num_groups: int
    kept_groups: int
    scale: float
    in_float32: ClassVar[bool] = True
    has_bias: ClassVar[bool] = True

    def choose(self, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 weights and int64 experts, both [tokens, top_k], of float32 ``logits`` [tokens, experts]."""
        assert bias is not None
        scores = torch.sigmoid(logits)
        groups = (scores + bias).unflatten(-1, (self.num_groups, -1))
        kept = best(groups.topk(2, dim=-1).values.sum(dim=-1), self.kept_groups)
        out = torch.ones(groups.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, kept, False)
        chosen = best(groups.masked_fill(out[..., None], -torch.inf).flatten(1), self.top_k)
        weights = scores.gather(1, chosen)
        if self.top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.scale, chosen


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [rows, count] of the highest of ``scores`` [rows, n], falling; the lowest index among equal ones."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


@dataclass(frozen=True)
class ExpertsShape:
    num_experts: int
    intermediate_size: int  # of an expert
    shared_size: int  # intermediate size of what sees every token, 0 if there is none
    routing: SoftmaxRouting | GroupedSigmoidRouting


class Router(nn.Module):
    def __init__(self, hidden_size: int, shape: ExpertsShape) -> None:
        super().__init__()
        self.routing = shape.routing
        dtype = torch.float32 if self.routing.in_float32 else None
        self.weight = nn.Parameter(torch.empty(shape.num_experts, hidden_size, dtype=dtype), requires_grad=False)
        bias = torch.zeros(shape.num_experts, dtype=torch.float32)
        self.expert_bias = nn.Parameter(bias, requires_grad=False) if self.routing.has_bias else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.routing.choose(F.linear(x.to(self.weight.dtype), self.weight), self.expert_bias)


class StackedLinear(nn.Module):
    """A projection of all experts, ``weight`` [experts, outputs, inputs], of which dimension ``dim`` is shared by the ranks.

    A checkpoint has ``parts`` of the outputs apart.
    """

    def __init__(self, num_experts: int, outputs: int, inputs: int, dim: int, parts: int = 1) -> None:
        super().__init__()
        self.dim, self.parts = dim, parts
        self.weight = nn.Parameter(torch.empty(num_experts, outputs, inputs), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self.load})

    def load(self, param: torch.Tensor, tensor: torch.Tensor, shard: tuple[int | None, int]) -> None:
        """Take this rank's share of a part of one expert's outputs, or of all experts' where the expert is None.

        vLLM, which puts another parameter in its place to load weights again, calls the first argument ``param``.
        """
        expert, part = shard
        share = tensor.chunk(get_tensor_model_parallel_world_size(), self.dim)[get_tensor_model_parallel_rank()]
        (param.data if expert is None else param.data[expert]).chunk(self.parts, -2)[part].copy_(share)


class Experts(nn.Module):
    """What the chosen experts make of each token, weighted and added up, and what ``shared`` makes of all tokens.

    On a GPU vLLM's fused kernel rounds each weighted output to the model's dtype before it adds them. On a CPU, and in
    float32, outputs are weighted and added up in the weights' dtype and in the order of the experts, as in the published code.
    """

    def __init__(self, hidden_size: int, shape: ExpertsShape, shared: nn.Module | None) -> None:
        super().__init__()
        world_size = get_tensor_model_parallel_world_size()
        if shape.intermediate_size % world_size:
            raise ValueError(
                f"the ranks share the intermediate size of each expert, {shape.intermediate_size}, which "
                f"tensor_parallel_size={world_size} does not divide; choose another --tensor-parallel-size"
            )
        self.world_size, share = world_size, shape.intermediate_size // world_size
        self.router = Router(hidden_size, shape)
        self.stacked_gate_up = StackedLinear(shape.num_experts, 2 * share, hidden_size, dim=-2, parts=2)
        self.stacked_down = StackedLinear(shape.num_experts, hidden_size, share, dim=-1)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run = run_each if not x.is_cuda else run_fused if x.dtype.itemsize == 2 else run_all
        out = run(x, self.stacked_gate_up.weight, self.stacked_down.weight, *self.router(x))
        if self.world_size > 1:
            out = tensor_model_parallel_all_reduce(out)
        out = out.to(x.dtype)
        return out if self.shared is None else out + self.shared(x)


def run_each(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """``[tokens, hidden_size]`` of the dtype of ``weights``, one expert after another."""
    out = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    for expert in chosen.unique().tolist():
        tokens, place = (chosen == expert).nonzero(as_tuple=True)
        rows = F.pad(x[tokens], (0, 0, 0, max(0, _ROWS - len(tokens))))
        rows = F.linear(gated_silu(F.linear(rows, gate_up[expert])), down[expert])[: len(tokens)]
        out[tokens] += rows.to(weights.dtype) * weights[tokens, place, None]
    return out


def run_all(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """The same on a GPU, every expert over all tokens, so that nothing waits for the host.

    vLLM's kernel would multiply float32 with the 10 bits of TF32.
    """
    out = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    for expert in range(len(down)):
        weight = (weights * (chosen == expert)).sum(dim=1, keepdim=True)
        out += F.linear(gated_silu(F.linear(x, gate_up[expert])), down[expert]).to(weights.dtype) * weight
    return out


def run_fused(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    return fused_experts(x, gate_up, down, weights.float(), chosen.int())

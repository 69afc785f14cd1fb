"""Which experts each token goes to, and with what weights: one launch a layer.

Scores are fp32. Among equal ones the lowest expert, or group of experts, comes first, which `torch.topk` does not promise.
Zero tokens are allowed. On one device the kernel has the rule's experts and, up to the sum over a token's chosen experts, its
weights: to 2**-22 relative before they are rounded. Where two experts are within an fp32 rounding of the softmax, whose sum has
another order, they may change places.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm_plugin.kernels import dispatch
from dllm_plugin.kernels.dispatch import FLOATS, libdevice, refuse, tl, triton, use_triton


@dataclass(frozen=True)
class SoftmaxRouting:
    """The best of a softmax over all experts, rounded to the logits' dtype (OLMoE's and Qwen3-MoE's).

    Source: yjyddq/DARE:models/SDAR-30B-A3B-Chat/modeling_sdar_moe.py, InfiniTensor/InfiniLM:modeling_lladamoe.py.
    """

    top_k: int
    normalized: bool  # the weights of a token sum to 1
    in_float32: ClassVar[bool] = False  # the logits are
    has_bias: ClassVar[bool] = False


@dataclass(frozen=True)
class GroupedSigmoidRouting:
    """The best of the best groups by sigmoid plus a bias, which has no part in the weights.

    A group, of experts side by side, is worth the sum of its two best biased scores. With `top_k` above 1 the weights of a token
    are divided by their sum, and then multiplied by `scale`.
    Source: yjyddq/DARE:models/LLaDA2.0-mini/modeling_llada2_moe.py.
    """

    top_k: int
    num_groups: int
    kept_groups: int
    scale: float
    in_float32: ClassVar[bool] = True
    has_bias: ClassVar[bool] = True


Routing = SoftmaxRouting | GroupedSigmoidRouting


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """Weights, of the logits' dtype, and int32 experts, best first, both [tokens, top_k].

    `logits` [tokens, experts]: bf16, fp16 or fp32, fp32 where the routing is `in_float32`, any row stride. `bias` [experts] fp32
    where it has one, else None.
    """
    _check(logits, bias, routing)
    return (route_triton if use_triton(logits.device.type) else route_rule)(logits, bias, routing)


def route_rule(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    if isinstance(routing, SoftmaxRouting):
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
        chosen = best(scores, routing.top_k)
        weights = scores.gather(1, chosen)
        if routing.normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(logits.dtype), chosen.to(torch.int32)
    assert bias is not None
    scores = torch.sigmoid(logits)
    groups = (scores + bias).unflatten(-1, (routing.num_groups, -1))
    kept = best(groups.topk(2, dim=-1).values.sum(dim=-1), routing.kept_groups)
    out = torch.ones(groups.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, kept, False)
    chosen = best(groups.masked_fill(out[..., None], -torch.inf).flatten(1), routing.top_k)
    weights = scores.gather(1, chosen)
    if routing.top_k > 1:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * routing.scale, chosen.to(torch.int32)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices [rows, count] of the highest of `scores` [rows, n], falling; the lowest index among equal ones."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _check(logits: Tensor, bias: Tensor | None, routing: Routing) -> None:
    dtypes = (torch.float32,) if routing.in_float32 else FLOATS
    if logits.dim() != 2 or logits.dtype not in dtypes or logits.stride(1) != 1 or logits.shape[1] < routing.top_k:
        names = " or ".join(str(dtype) for dtype in dtypes)
        refuse(
            f"logits must be {names} [tokens, experts] of at least {routing.top_k} experts side by side",
            {"logits": logits},
        )
    num_experts = logits.shape[1]
    if (bias is not None) != routing.has_bias:
        must = f"needs a bias [{num_experts}]; pass it" if routing.has_bias else "has no bias; leave it out"
        raise ValueError(f"{type(routing).__name__} {must}")
    if bias is None or not isinstance(routing, GroupedSigmoidRouting):
        return
    if num_experts % routing.num_groups or num_experts < 2 * routing.num_groups:
        refuse(f"logits must be of {routing.num_groups} groups of as many experts, two at least", {"logits": logits})
    if bias.shape != (num_experts,) or bias.dtype != torch.float32 or bias.device != logits.device:
        refuse(f"bias must be torch.float32 [{num_experts}]", {"bias": bias}, {"logits": logits})


def route_triton(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    tokens, num_experts = logits.shape
    weights = logits.new_empty((tokens, routing.top_k))
    experts = logits.new_empty((tokens, routing.top_k), dtype=torch.int32)
    if tokens == 0:
        return weights, experts
    groups, kept, scale = 1, 1, 1.0
    if isinstance(routing, GroupedSigmoidRouting):
        groups, kept, scale, normalized = routing.num_groups, routing.kept_groups, routing.scale, routing.top_k > 1
    else:
        normalized = routing.normalized
    size = num_experts // groups
    _route_kernel[(tokens,)](
        logits, logits.stride(0), None if bias is None else bias.contiguous(), weights, experts, scale,
        SIZE=size, GROUPS=groups, KEPT=kept, TOP_K=routing.top_k, SIGMOID=routing.has_bias, NORMALIZED=normalized,
        BLOCK_G=triton.next_power_of_2(groups), BLOCK_S=triton.next_power_of_2(size),
        BLOCK_K=triton.next_power_of_2(routing.top_k), INTERPRETED=dispatch.INTERPRETED, num_warps=1,
    )  # fmt: skip
    return weights, experts


@triton.jit
def _exp(x, INTERPRETED: tl.constexpr):
    """The exponential that torch computes on a GPU. Triton's own is off by some roundings: near experts would change places."""
    return tl.exp(x) if INTERPRETED else libdevice.exp(x)


@triton.jit
def _score(x, highest, total, SIGMOID: tl.constexpr, INTERPRETED: tl.constexpr):
    e = _exp(-x if SIGMOID else x - highest, INTERPRETED)
    return tl.div_rn(1.0, 1.0 + e) if SIGMOID else tl.div_rn(e, total)


@triton.jit
def _route_kernel(
    logits_ptr, logits_stride, bias_ptr, weights_ptr, experts_ptr, scale,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr,
    NORMALIZED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A token a program, of one warp."""
    token = tl.program_id(0).to(tl.int64)
    group, member, place = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    expert = group[:, None] * SIZE + member[None, :]
    exists = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    logits = logits_ptr + token * logits_stride
    x = tl.load(logits + expert, mask=exists, other=float("-inf")).to(tl.float32)
    highest = tl.max(tl.max(x, 1), 0)
    total = tl.sum(tl.sum(_exp(x - highest, INTERPRETED), 1), 0)
    worth = _score(x, highest, total, SIGMOID, INTERPRETED)
    if bias_ptr is not None:
        worth += tl.load(bias_ptr + expert, mask=exists, other=float("-inf"))
    if KEPT < GROUPS:
        first = tl.max(worth, 1)
        at = tl.min(tl.where(worth == first[:, None], member[None, :], BLOCK_S), 1)
        second = tl.max(tl.where(member[None, :] == at[:, None], float("-inf"), worth), 1)
        both = tl.where(group < GROUPS, first + second, float("-inf"))
        other = tl.reshape(both, [1, BLOCK_G])
        ahead = (other > both[:, None]) | ((other == both[:, None]) & (group[None, :] < group[:, None]))
        worth = tl.where((tl.sum(ahead.to(tl.int32), 1) < KEPT)[:, None], worth, float("-inf"))

    # One number orders experts by worth and then by index; it is taken away with its expert.
    bits = worth.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) * 2147483648 + (2147483647 - expert)
    order = tl.where(exists, order, -9223372036854775807)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.max(tl.max(order, 1), 0)
        chosen = tl.where(place == k, (2147483647 - (best & 2147483647)).to(tl.int32), chosen)
        order = tl.where(order == best, -9223372036854775807, order)

    weight = _score(tl.load(logits + chosen).to(tl.float32), highest, total, SIGMOID, INTERPRETED)
    if NORMALIZED:
        sum_of_chosen = tl.sum(tl.where(place < TOP_K, weight, 0.0), 0)
        weight = tl.div_rn(weight, (sum_of_chosen + 1e-20) if SIGMOID else sum_of_chosen)
    out = token * TOP_K + place
    tl.store(weights_ptr + out, (weight * scale).to(weights_ptr.dtype.element_ty), mask=place < TOP_K)
    tl.store(experts_ptr + out, chosen, mask=place < TOP_K)

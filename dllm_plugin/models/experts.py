"""Experts of a layer, and the router that chooses among them.

The ranks of a tensor-parallel group share the intermediate size of each expert, or in expert parallelism the experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from dllm_plugin.kernels.gated_silu import gated_silu
from dllm_plugin.kernels.route import Routing, route
from dllm_plugin.messages import shown

_ROWS = 4  # a row of a product of fewer has other bits on a CPU (MKL), and how many an expert gets is up to the batch


@dataclass(frozen=True)
class ExpertsShape:
    num_experts: int
    intermediate_size: int  # of an expert
    shared_size: int  # intermediate size of what sees every token, 0 if there is none
    routing: Routing


class Router(nn.Module):
    def __init__(self, hidden_size: int, shape: ExpertsShape) -> None:
        super().__init__()
        self.routing = shape.routing
        dtype = torch.float32 if self.routing.in_float32 else None
        self.weight = nn.Parameter(torch.empty(shape.num_experts, hidden_size, dtype=dtype), requires_grad=False)
        bias = torch.zeros(shape.num_experts, dtype=torch.float32)
        self.expert_bias = nn.Parameter(bias, requires_grad=False) if self.routing.has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[tokens, experts]``."""
        return F.linear(x.to(self.weight.dtype), self.weight)

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return route(logits, self.expert_bias, self.routing)


def experts_of_rank(num_experts: int, vllm_config: VllmConfig) -> range:
    """The experts that this rank holds: all, or in expert parallelism as many as any other rank, the first ones one more.

    Raises ValueError where a rank would have none.
    """
    world_size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    if not vllm_config.parallel_config.enable_expert_parallel:
        return range(num_experts)
    if num_experts < world_size:
        raise ValueError(
            f"expert parallelism gives each rank experts of its own, and {num_experts} are too few for tensor_parallel_size="
            f"{world_size}; remove --enable-expert-parallel"
        )
    share, rest = divmod(num_experts, world_size)
    first = rank * share + min(rank, rest)
    return range(first, first + share + (rank < rest))


class StackedExperts(nn.Module):
    """The experts ``mine`` of a rank in the model's dtype: ``w13_weight`` [experts, 2 * width, hidden_size], gates first, and
    ``w2_weight`` [experts, hidden_size, width], named as in vLLM's own layer. Where each rank has all experts, the ranks share
    the width of each.

    On a GPU vLLM's fused kernel rounds each weighted output to the model's dtype before it adds them. On a CPU, and in
    float32, outputs are weighted and added up in the weights' dtype and in the order of the experts, as in the published code.
    """

    places: torch.Tensor | None

    def __init__(self, hidden_size: int, shape: ExpertsShape, router: Router, mine: range) -> None:
        super().__init__()
        self.world_size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.choose, self.mine, self.share, self.num_shares = router.choose, mine, rank, self.world_size
        if len(mine) < shape.num_experts:
            self.share, self.num_shares = 0, 1
        if shape.intermediate_size % self.num_shares:
            raise ValueError(
                f"the ranks share the intermediate size of each expert, {shape.intermediate_size}, which "
                f"tensor_parallel_size={self.world_size} does not divide; choose another --tensor-parallel-size, or share the "
                "experts themselves: --enable-expert-parallel"
            )
        width = shape.intermediate_size // self.num_shares
        self.w13_weight = nn.Parameter(torch.empty(len(mine), 2 * width, hidden_size), requires_grad=False)
        self.w2_weight = nn.Parameter(torch.empty(len(mine), hidden_size, width), requires_grad=False)
        for weight in (self.w13_weight, self.w2_weight):
            set_weight_attrs(weight, {"weight_loader": self.load})
        places = None  # of all experts among mine, -1 for those of other ranks
        if len(mine) < shape.num_experts:
            places = torch.full((shape.num_experts,), -1, dtype=torch.int32)
            places[mine.start : mine.stop] = torch.arange(len(mine), dtype=torch.int32)
        self.register_buffer("places", places, persistent=False)

    def load(
        self, param: torch.Tensor, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int
    ) -> None:
        """Take this rank's share of a projection of one expert: gate ``w1``, up ``w3`` or down ``w2``.

        The arguments are those of vLLM's layer. It puts another parameter in the place of ``param`` to load weights again.
        """
        if expert_id not in self.mine:
            return
        whole = param.data[self.mine.index(expert_id)]
        part = whole if shard_id == "w2" else whole.chunk(2)[shard_id == "w3"]
        part.copy_(loaded_weight.chunk(self.num_shares, 1 if shard_id == "w2" else 0)[self.share])

    def forward(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.choose(logits)
        if x.is_cuda and x.dtype.itemsize == 2:
            out = run_fused(x, self.w13_weight, self.w2_weight, weights, chosen, self.places)
        else:
            run = run_all if x.is_cuda else run_each
            out = run(x, self.w13_weight, self.w2_weight, weights, chosen - self.mine.start)
        if self.world_size > 1:
            out = tensor_model_parallel_all_reduce(out)
        return out.to(x.dtype)


def experts_layer(
    hidden_size: int, shape: ExpertsShape, router: Router, vllm_config: VllmConfig, prefix: str
) -> nn.Module:
    """What computes the experts, for inputs [tokens, hidden_size] and the router's logits; on every rank the whole sum.

    Beside a quantization it is vLLM's own layer. Raises ValueError where that cannot be: on a CPU, for which vLLM has hardly
    any kernels, unless the quantization leaves the experts out; and with adapters, which its layer would want for experts too.
    """
    quant_config, mine = vllm_config.quant_config, experts_of_rank(shape.num_experts, vllm_config)
    if quant_config is not None and current_platform.is_cpu():
        # one expert is asked for, by its own name: vLLM's layer of them cannot even be made where there is no kernel
        expert = LinearBase(
            hidden_size, shape.intermediate_size, quant_config=quant_config, prefix=f"{prefix}.0.up_proj"
        )
        if not isinstance(expert.quant_method, UnquantizedLinearMethod):
            raise ValueError(
                f"on a CPU experts keep the model's dtype, and quantization {shown(quant_config.get_name())} includes those of "
                f"{prefix}; serve the checkpoint on a GPU, or quantize it without its experts"
            )
    elif quant_config is not None:
        from vllm.model_executor.layers.fused_moe import FusedMoEFactory

        if vllm_config.lora_config is not None:
            raise ValueError(
                f"adapters and quantization {shown(quant_config.get_name())} of a model with experts exclude each other; remove "
                "--enable-lora"
            )
        return FusedMoEFactory(
            num_experts=shape.num_experts,
            top_k=shape.routing.top_k,
            hidden_size=hidden_size,
            intermediate_size=shape.intermediate_size,
            quant_config=quant_config,
            dp_size=1,
            pcp_size=1,
            custom_routing_function=lambda hidden_states, gating_output, topk, renormalize: router.choose(
                gating_output
            ),
            router_logits_dtype=router.weight.dtype,
            prefix=prefix,
        )
    return StackedExperts(hidden_size, shape, router, mine)


class Experts(nn.Module):
    """What the chosen experts make of each token, weighted and added up, and what ``shared`` makes of all tokens."""

    def __init__(
        self, hidden_size: int, shape: ExpertsShape, shared: nn.Module | None, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        self.router = Router(hidden_size, shape)
        self.experts = experts_layer(hidden_size, shape, self.router, vllm_config, f"{prefix}.experts")
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.experts(x, self.router(x))
        return out if self.shared is None else out + self.shared(x)


def run_each(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """``[tokens, hidden_size]`` of the dtype of ``weights``, one expert after another.

    ``chosen`` counts from the first expert of ``down``; what is outside of these is for other ranks.
    """
    out, mine = torch.zeros(x.shape, dtype=weights.dtype, device=x.device), range(len(down))
    for expert in (expert for expert in chosen.unique().tolist() if expert in mine):
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
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    places: torch.Tensor | None,
) -> torch.Tensor:
    """The same by vLLM's kernel, to which ``places`` tells the places in ``down`` of what ``chosen`` numbers."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    num_experts = len(down if places is None else places)
    return fused_experts(x, gate_up, down, weights.float(), chosen, global_num_experts=num_experts, expert_map=places)

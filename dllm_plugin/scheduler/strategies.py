"""The plan of each strategy."""

from typing import Any

from dllm_plugin.params import DiffusionParams
from dllm_plugin.scheduler.block_causal import BlockCausalPlan
from dllm_plugin.scheduler.blockwise import BlockwisePlan
from dllm_plugin.scheduler.d2f import D2FPlan
from dllm_plugin.scheduler.plan import Plan

STRATEGIES: dict[str, type[Plan]] = {"full": BlockwisePlan, "d2f": D2FPlan, "block": BlockCausalPlan}


def make_plan(params: DiffusionParams, *extent: Any, **more: Any) -> Plan:
    """The plan of a request; `Plan` says what the arguments are."""
    return STRATEGIES[params.strategy](params, *extent, **more)

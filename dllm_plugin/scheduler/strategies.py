"""The plan of each strategy."""

from dllm_plugin.params import DiffusionParams
from dllm_plugin.scheduler.d2f import D2FPlan
from dllm_plugin.scheduler.window import BlockwisePlan, Plan

STRATEGIES: dict[str, type[Plan]] = {"full": BlockwisePlan, "d2f": D2FPlan}


def make_plan(
    params: DiffusionParams, prompt_length: int, limit: int, shift: int = 0, num_suffix: int = 0, seed: int = 0
) -> Plan:
    """The plan of a request; `Plan` says what the numbers are."""
    return STRATEGIES[params.strategy](params, prompt_length, limit, shift, num_suffix, seed)

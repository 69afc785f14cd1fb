"""How many masks a timestep of a schedule unmasks: pure numbers, no windows."""

import math
from functools import lru_cache

import numpy as np


def split_blocks(canvas_length: int, block_length: int | None, steps: int | None) -> tuple[list[int], list[int]]:
    """Block lengths of a canvas, and the timesteps of each; None stands for one block, one timestep a position.

    As ML-GSAI/LLaDA:generate.py where everything divides evenly; otherwise the last block is shorter, and the first
    ``steps % blocks`` blocks have one timestep more. A block has at least one.
    """
    length = min(block_length or canvas_length, canvas_length)
    num_blocks = math.ceil(canvas_length / length)
    lengths = [length] * (num_blocks - 1) + [canvas_length - length * (num_blocks - 1)]
    steps = max(steps or canvas_length, num_blocks)
    return lengths, [steps // num_blocks + (i < steps % num_blocks) for i in range(num_blocks)]


def even_quota(num_masked_at_start: int, timestep: int, num_steps: int) -> int:
    """Positions unmasked in a timestep when a block's masks are spread evenly, larger shares first (LLaDA)."""
    share, rest = divmod(num_masked_at_start, num_steps)
    return share + (timestep < rest)


@lru_cache(maxsize=32)
def _dream_times(num_steps: int, eps: float) -> np.ndarray:
    """float32 ``[num_steps + 1]``, from 1 down to ``eps``: what Dream's generation_utils.py makes with torch.linspace.

    torch is imported here because no other linspace rounds the same way, and the truncation in `dream_quota` sees it.
    """
    import torch

    return torch.linspace(1, eps, num_steps + 1).numpy()


@lru_cache(maxsize=32)
def _dream_rates(num_steps: int, eps: float) -> np.ndarray:
    """``1 - s / t`` of every timestep, in float32 as Dream computes it."""
    time = _dream_times(num_steps, eps)
    return np.float32(1) - time[1:] / time[:-1]


def dream_quota(num_masked: int, timestep: int, num_steps: int, eps: float) -> int:
    """Positions unmasked in a timestep of Dream's schedule; may be zero, and the last one takes all that is left."""
    if timestep >= num_steps - 1:
        return num_masked
    return int(np.float32(num_masked) * _dream_rates(num_steps, eps)[timestep])


def dream_timesteps(num_masked: int, num_steps: int, eps: float) -> list[int]:
    """The timesteps of Dream's schedule in which so many masks are unmasked: one entry a mask, ascending."""
    timesteps: list[int] = []
    timestep = 0
    while left := num_masked - len(timesteps):
        some = np.float32(left) * _dream_rates(num_steps, eps)[timestep : num_steps - 1] >= 1
        timestep = timestep + int(some.argmax()) if some.any() else num_steps - 1
        timesteps += [timestep] * dream_quota(left, timestep, num_steps, eps)
        timestep += 1
    return timesteps


def origin_timesteps(draws: np.ndarray, num_steps: int, eps: float) -> list[int]:
    """The timesteps in which Dream's ``origin`` unmasks positions whose numbers are ``draws``: one entry each, ascending.

    Published, each masked position is unmasked in a timestep from time t to s with probability 1 - s / t, so that it is
    still masked at time s with probability s. Here every position draws one number in (0, 1) for all timesteps, and is
    unmasked in the first that ends below it, which is the same distribution (Dream's generation_utils.py,
    ``alg == 'origin'``); the last timestep takes all that is left.
    """
    times_not_below = np.searchsorted(-_dream_times(num_steps, eps), -draws, side="right")
    return np.sort(np.minimum(times_not_below, num_steps) - 1).tolist()

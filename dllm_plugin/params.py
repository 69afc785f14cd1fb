"""The decoding parameters of one request: names, types, ranges, defaults. Standard library only.

A request gives them as ``SamplingParams(extra_args={"diffusion_steps": 64})``, over HTTP inside ``vllm_xargs``; an
engine-wide default is given without the prefix, ``--additional-config '{"diffusion": {"steps": 64}}'``.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

PREFIX = "diffusion_"

# A policy names the algorithm of the public decoder it comes from: its schedule, how tokens are drawn and how
# positions are ranked. Any policy runs on any family.
LLADA_POLICIES = ("low_confidence", "random")  # ML-GSAI/LLaDA:generate.py
DREAM_POLICIES = ("origin", "maskgit_plus", "topk_margin", "entropy")  # Dream's generation_utils.py
REMASKING_POLICIES = LLADA_POLICIES + DREAM_POLICIES
EOS_SUPPRESSIONS = ("none", "logits", "confidence")
CACHE_MODES = ("none",)

DEFAULT_CANVAS_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class DiffusionParams:
    """Decoding parameters of one request. ``None`` means: derived from the canvas.

    steps: denoising steps for a canvas (default: one a canvas position). block_length: the canvas is unmasked block
    after block of this many positions (default: the whole canvas is one block). canvas_length: masked positions laid
    out at once; a longer answer goes on in a further canvas. remasking: which masked positions keep their token in a
    step. alg_temp: Dream's temperature of that choice, 0 takes the best. eps: Dream's smallest time. cfg_scale:
    LLaDA's classifier-free guidance, 0 is off. eos_suppression: LLaDA's logits_eos_inf and confidence_eos_eot_inf.
    cache: what of the KV cache is reused between steps.
    """

    steps: int | None = None
    block_length: int | None = None
    canvas_length: int = DEFAULT_CANVAS_LENGTH
    remasking: str = "low_confidence"
    alg_temp: float = 0.0
    eps: float = 1e-3
    cfg_scale: float = 0.0
    eos_suppression: str = "none"
    cache: str = "none"


@dataclass(frozen=True, slots=True)
class _Rule:
    """Type and range of one parameter; ``choices`` for a name, otherwise bounds (``low`` inclusive)."""

    kind: type
    low: float = 0.0
    high: float = math.inf
    choices: tuple[str, ...] = ()
    high_excluded: bool = False

    def __str__(self) -> str:
        if self.choices:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        kind = "an integer" if self.kind is int else "a finite number"
        if math.isinf(self.high):
            return f"{kind} of at least {self.low:g}"
        return f"{kind} in [{self.low:g}, {self.high:g}{')' if self.high_excluded else ']'}"

    def accepts(self, value: Any) -> bool:
        if self.choices:
            return isinstance(value, str) and value in self.choices
        # bool is an int to Python, and True is not a number of steps
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else (int, float)):
            return False
        within = self.low <= value < self.high if self.high_excluded else self.low <= value <= self.high
        return math.isfinite(value) and within


RULES: dict[str, _Rule] = {
    "steps": _Rule(int, 1, 1_000_000),
    "block_length": _Rule(int, 1, 1_000_000),
    "canvas_length": _Rule(int, 1, 1_000_000),
    "remasking": _Rule(str, choices=REMASKING_POLICIES),
    "alg_temp": _Rule(float, 0.0),
    "eps": _Rule(float, 0.0, 1.0, high_excluded=True),
    "cfg_scale": _Rule(float, 0.0),
    "eos_suppression": _Rule(str, choices=EOS_SUPPRESSIONS),
    "cache": _Rule(str, choices=CACHE_MODES),
}
assert set(RULES) == {field.name for field in fields(DiffusionParams)}


def parse_engine_defaults(settings: Any, base: DiffusionParams) -> DiffusionParams:
    """``base`` with the engine-wide ``settings`` (``{"steps": 64}``) applied. Raises ValueError for a wrong one."""
    where = '--additional-config {"diffusion": ...}'
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where} must be a mapping of parameter names to values, got {settings!r}")
    for name, value in settings.items():
        if name not in RULES:
            raise ValueError(f"{where} has an unknown parameter {name!r}{_nearest(name, RULES)}")
        _check(f"{where} {name}", name, value)
    return replace(base, **settings)


def parse_request(extra_args: Mapping[str, Any] | None, defaults: DiffusionParams) -> DiffusionParams:
    """The parameters of a request: ``defaults`` with its ``diffusion_*`` extras applied.

    Extras that belong to someone else are left alone; one that is meant for us but is not known, or has a wrong type
    or value, raises ValueError.
    """
    given: dict[str, Any] = {}
    for key, value in (extra_args or {}).items():
        name = key.removeprefix(PREFIX)
        if key.startswith(PREFIX) and name in RULES:
            _check(key, name, value)
            given[name] = value
        elif key.lower().startswith("diffusion") or name in RULES or _nearest(key, _keys(), cutoff=0.8):
            raise ValueError(f"unknown diffusion parameter {key!r}{_nearest(key, _keys())}; known: {', '.join(_keys())}")
    return replace(defaults, **given)


def check_request(extra_args: Mapping[str, Any] | None, max_tokens: int | None) -> None:
    """Raise ValueError where a request's extras are wrong in themselves or cannot hold together.

    Only what the request says itself is checked against each other; an engine-wide default gives way to it.
    """
    nothing = DiffusionParams()
    params = parse_request(extra_args, nothing)
    if params.steps is None or params.block_length is None:
        return
    canvas = min(params.canvas_length, max_tokens or params.canvas_length)
    blocks = math.ceil(canvas / params.block_length)
    if params.steps < blocks:
        raise ValueError(
            f"diffusion_steps must be at least the number of blocks, one step a block: {params.steps} steps cannot "
            f"unmask {blocks} blocks of {params.block_length} positions (canvas of {canvas}); raise diffusion_steps "
            f"to {blocks} or diffusion_block_length to {math.ceil(canvas / params.steps)}"
        )


def _keys() -> list[str]:
    return [PREFIX + name for name in RULES]


def _check(label: str, name: str, value: Any) -> None:
    if not RULES[name].accepts(value):
        raise ValueError(f"{label} must be {RULES[name]}, got {value!r}")


def _nearest(name: str, known: Any, cutoff: float = 0.0) -> str:
    """`` (did you mean 'x'?)`` for the nearest known name; empty where none is as near as ``cutoff``."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {match[0]!r}?)" if match else ""

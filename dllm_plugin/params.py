"""The decoding parameters of one request: names, types, ranges, defaults, and which exclude each other.

A request gives them as ``SamplingParams(extra_args={"diffusion_steps": 64})``, over HTTP inside ``vllm_xargs``; an
engine-wide default is given without the prefix, ``--additional-config '{"diffusion": {"steps": 64}}'``. Standard library
only.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dllm_plugin.messages import shown
from dllm_plugin.policies import POLICIES

PREFIX = "diffusion_"
HOLE = -1

PROFILES = ("exact", "balanced", "fast")
DEFAULT_PROFILE = "balanced"
MOST = 1_000_000  # nothing is larger; far beyond any use, so that it is not worth a word


@dataclass(frozen=True, slots=True)
class Rule:
    """Type and range of one parameter; ``choices`` for a name, otherwise bounds."""

    kind: type
    low: float = 0.0
    high: float = math.inf
    choices: tuple[str, ...] = ()
    low_excluded: bool = False
    high_excluded: bool = False

    def __str__(self) -> str:
        if self.choices:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        if self.kind is list:
            return f"a list of integers of at least {self.low:g}, not empty"
        if self.kind is str:
            return "a text or a list of token ids, not empty"
        kind = "an integer" if self.kind is int else "a finite number"
        if math.isinf(self.high) or self.high == MOST:
            return f"{kind} {'greater than' if self.low_excluded else 'of at least'} {self.low:g}"
        left, right = "(" if self.low_excluded else "[", ")" if self.high_excluded else "]"
        return f"{kind} in {left}{self.low:g}, {self.high:g}{right}"

    def accepts(self, value: Any) -> bool:
        if self.choices:
            return isinstance(value, str) and value in self.choices
        if self.kind is str and isinstance(value, str):
            return value != "" and _is_encodable(value)
        if self.kind in (str, list):
            items = value if isinstance(value, (list, tuple)) else ()
            return len(items) > 0 and all(_is_number(item, int) and item >= self.low for item in items)
        if not _is_number(value, self.kind):
            return False
        above = value > self.low if self.low_excluded else value >= self.low
        return above and (value < self.high if self.high_excluded else value <= self.high)


def _is_number(value: Any, kind: type) -> bool:
    # bool is an int to Python and np.float64 a float: True is no number of steps, and no NumPy scalar reaches the engine
    return type(value) is int or (kind is float and type(value) is float and math.isfinite(value))


def _is_encodable(text: str) -> bool:
    """Whether it is without half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parameter(rule: Rule, default: Any, text: str) -> Any:
    return field(default=default, metadata={"rule": rule, "text": text})


_COUNT = Rule(int, 1, MOST)
_SHARE = Rule(float, 0.0, 1.0)
_NUMBER = Rule(float, 0.0, MOST)


@dataclass(frozen=True, slots=True)
class DiffusionParams:
    """Decoding parameters of one request, with the rule and the text of each. None: off, or derived from the canvas."""

    profile: str | None = _parameter(
        Rule(str, choices=PROFILES),
        None,
        "settings of the family that all others start from (docs/profiles.md): those of its reference decoder, of its chats, or "
        "of its fastest decoding; default: the engine's, balanced",
    )
    steps: int | None = _parameter(
        _COUNT,
        None,
        "denoising steps of a canvas; default: one a position; raised to one a block. Unused with a threshold; block has "
        "diffusion_block_steps instead",
    )
    block_length: int | None = _parameter(
        _COUNT,
        None,
        "the canvas is unmasked block after block of this many positions; default: all of it, for d2f 32, "
        "for block the checkpoint's",
    )
    canvas_length: int = _parameter(
        _COUNT, 1024, "masked positions laid out at once, at most max_tokens; a longer answer takes another canvas"
    )
    remasking: str = _parameter(
        Rule(str, choices=tuple(POLICIES)),
        "low_confidence",
        "how positions are ranked, and whose algorithm that is; default: low_confidence, for Dream origin",
    )
    threshold: float | None = _parameter(
        _SHARE, None, "unmask every position whose probability is above it, at least one a step"
    )
    factor: float | None = _parameter(
        Rule(float, 0.0, MOST, low_excluded=True),
        None,
        "unmask the k most probable positions while p_k >= 1 - factor / (k + 1), at least one a step",
    )
    alg_temp: float = _parameter(
        _NUMBER, 0.0, "temperature of the order in which positions are taken; 0 takes the best"
    )
    eps: float = _parameter(Rule(float, 0.0, 1.0, high_excluded=True), 1e-3, "smallest time of Dream's schedule")
    cfg_scale: float = _parameter(
        _NUMBER, 0.0, "classifier-free guidance; 0 is off. Each step then forwards a second, prompt-less copy"
    )
    eos_suppression: str = _parameter(
        Rule(str, choices=("none", "logits", "confidence")),
        "none",
        "logits: EOS is never chosen. confidence: EOS and end of turn are taken last",
    )
    max_steps: int | None = _parameter(
        _COUNT,
        None,
        "forward passes of a request at most, but for a preempted canvas; the last one unmasks all that is left, for block "
        "of its block",
    )
    cache: str = _parameter(
        Rule(str, choices=("none", "prefix", "dual")),
        "none",
        "prefix, dual: only forward the block and what follows, or the block alone, between refreshes (Fast-dLLM)",
    )
    cache_refresh: int = _parameter(
        Rule(int, 0, MOST), 0, "also forward everything every this many steps of a block; 0: at its first step only"
    )
    prompt_refresh: int | None = _parameter(
        Rule(int, 0, MOST),
        None,
        "forward the prompt anew in the refreshes of every so many blocks, in the others from the canvas on; 0: once a canvas. "
        "Default: 1, beside diffusion_refresh_window 0",
    )
    refresh_window: int | None = _parameter(
        Rule(int, 0, MOST),
        None,
        "a refresh forwards the block and so many positions on either side, unless it is the first of a block whose turn it is "
        "by diffusion_prompt_refresh; default: everything",
    )
    strategy: str = _parameter(
        Rule(str, choices=("full", "d2f", "block")),
        "full",
        "d2f: pipelined blocks under block-causal attention with an exact cache, for D2F checkpoints. block: one block after "
        "the other under block-causal attention, always and only for families trained so",
    )
    block_steps: int | None = _parameter(
        _COUNT,
        None,
        "block: denoising steps of a block, or of each of its sub-blocks; default: one a position. Beside a threshold a step "
        "unmasks at least what they ask",
    )
    sub_block_length: int | None = _parameter(
        _COUNT,
        None,
        "block: a block is unmasked sub-block after sub-block of this many positions; default: all of it",
    )
    entropy_bound: float | None = _parameter(
        Rule(float, 0.0, MOST, low_excluded=True),
        None,
        "block: unmask the positions of least entropy while their entropies add up to less, at least one a step",
    )
    edit_threshold: float | None = _parameter(
        Rule(float, 0.0, MOST),
        None,
        "block: replace an unmasked token of the open block where the model prefers another with a probability above it",
    )
    max_post_steps: int = _parameter(
        Rule(int, 0, MOST),
        16,
        "block: steps of a block without a mask at most, in which tokens are only replaced",
    )
    preset: str | None = _parameter(
        Rule(str, choices=("quality", "speed")),
        None,
        "block: quality: threshold 0.7 and edit_threshold 0.5, speed: 0.5 and 0, which are LLaDA2.1's modes; what is given "
        "beside it holds. Other models have not learnt to edit, and answer wrongly",
    )
    confidence: str | None = _parameter(
        Rule(str, choices=("plain", "tempered", "filtered")),
        None,
        "what probabilities are of: plain logits, those divided by the temperature, or what min_p, top_k and top_p leave; "
        "default: as the family's decoder has it, for block tempered",
    )
    d2f_add_threshold: float = _parameter(
        _SHARE, 0.1, "the next block is opened when this share of the last one is unmasked"
    )
    d2f_complete_threshold: float = _parameter(
        _SHARE, 0.95, "a block must progress every step once this share of the one before it is unmasked"
    )
    d2f_accept_threshold: float = _parameter(_SHARE, 0.9, "probability above which a token is taken")
    d2f_max_blocks: int = _parameter(Rule(int, 0, MOST), 0, "blocks that may be open at once; 0: any number")
    suffix: str | tuple[int, ...] = _parameter(Rule(str, 0), (), "text or token ids that stand after the canvas")
    template: tuple[int, ...] = _parameter(
        Rule(list, HOLE), (), "token ids of the canvas; -1 is a hole, everything else is pinned"
    )
    trajectory: int = _parameter(
        Rule(int, 0, 1),
        0,
        "1: the response says in which forward pass each token was unmasked or replaced, and with which confidence",
    )
    likelihood_start: int = _parameter(
        Rule(int, -MOST, MOST),
        0,
        "prompt_logprobs: tokens of the prompt that are context and not scored; below 0: all but the last so many",
    )
    likelihood_samples: int = _parameter(
        Rule(int, 0, MOST),
        0,
        "prompt_logprobs under full attention: Monte Carlo of so many samples, as LLaDA's paper has it; 0: the exact chain from "
        "left to right, a forward pass a token",
    )


PARAMETERS = {each.name: each for each in fields(DiffusionParams)}
RULES: dict[str, Rule] = {name: each.metadata["rule"] for name, each in PARAMETERS.items()}
DESCRIPTIONS: dict[str, str] = {name: each.metadata["text"] for name, each in PARAMETERS.items()}
NEUTRAL = DiffusionParams()


def _is_set(values: Mapping[str, Any], name: str) -> bool:
    return values[name] != getattr(NEUTRAL, name)


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two parameters of which the second cannot hold where the first is set, unless ``allows`` its value.

    ``value``: of the first, where only that one clashes. ``instead``: what the second gives way to, from its value; its
    neutral value where nothing is said.
    """

    first: str
    second: str
    reason: str
    allows: Callable[[Any], bool] | None = None
    instead: Callable[[Any], Any] | None = None
    value: Any = None

    def holds(self, values: Mapping[str, Any]) -> bool:
        first_clashes = _is_set(values, self.first) if self.value is None else values[self.first] == self.value
        second_clashes = not self.allows(values[self.second]) if self.allows else _is_set(values, self.second)
        return first_clashes and second_clashes

    def second_instead(self, values: Mapping[str, Any]) -> Any:
        return self.instead(values[self.second]) if self.instead else getattr(NEUTRAL, self.second)


BLOCK = "block"  # the strategy of families under block-causal attention, which have no other
_OF_BLOCK = ("block_steps", "sub_block_length", "entropy_bound", "edit_threshold")
PRESETS = {  # as the card of inclusionAI/LLaDA2.1-mini names them
    "quality": {"threshold": 0.7, "edit_threshold": 0.5},
    "speed": {"threshold": 0.5, "edit_threshold": 0.0},
}
# What a default gives way to where only the second is given; given together, the first decides.
GIVES_WAY = (("threshold", "steps"), ("factor", "steps"))
_BY_PROBABILITY = tuple(policy.name for policy in POLICIES.values() if policy.is_by_probability)


_BY_ENTROPY = tuple(policy.name for policy in POLICIES.values() if policy.ranking == "negative_entropy")


def _compares_probabilities(name: str, value: Any = None) -> Conflict:
    return Conflict(
        name,
        "remasking",
        f"it compares probabilities, which {_BY_PROBABILITY} rank by",
        allows=_BY_PROBABILITY.__contains__,
        instead=lambda remasking: POLICIES[remasking].by_probability,
        value=value,
    )


CONFLICTS = (
    *(
        Conflict(name, "strategy", "it is of the strategy 'block'", allows=BLOCK.__eq__, instead=lambda _: BLOCK)
        for name in _OF_BLOCK
    ),
    *(
        Conflict(
            "strategy", name, "d2f brings its own rule for it, or sees nothing behind its open blocks", value="d2f"
        )
        for name in ("threshold", "factor", "alg_temp", "cfg_scale", "cache", "suffix", "template", "confidence")
    ),
    *(
        Conflict("strategy", name, reason, allows, value=BLOCK)
        for name, reason, allows in (
            ("steps", "a block has steps of its own, which diffusion_block_steps counts", None),
            ("cfg_scale", "the unconditional copy has no KV cache of its own", None),
            ("suffix", "a position sees nothing behind its block", None),
            ("likelihood_samples", "a block has an exact chain of few passes", None),
            ("cache", "keys and values are exact; dual forwards sub-blocks alone", ("none", "dual").__contains__),
        )
    ),
    *(
        Conflict(first, second, "each says by itself how many positions a step unmasks")
        for first, second in (("threshold", "factor"), ("entropy_bound", "threshold"), ("entropy_bound", "factor"))
    ),
    Conflict("edit_threshold", "sub_block_length", "the tokens of a block are replaced until it is final as a whole"),
    Conflict("edit_threshold", "entropy_bound", "it compares probabilities, and an entropy bound ranks by entropies"),
    _compares_probabilities("strategy", "d2f"),
    *(_compares_probabilities(name) for name in ("threshold", "factor", "edit_threshold")),
    Conflict(
        "entropy_bound",
        "remasking",
        f"it adds up entropies, which {_BY_ENTROPY} rank by",
        allows=_BY_ENTROPY.__contains__,
        instead=lambda _: _BY_ENTROPY[0],
    ),
    *(
        Conflict(name, "alg_temp", "it takes the positions above it, and alg_temp takes positions at random")
        for name in ("threshold", "factor", "entropy_bound")
    ),
    Conflict("cfg_scale", "cache", "the unconditional copy has no KV cache of its own"),
)


def resolve(base: DiffusionParams, given: Mapping[str, Any], label: str) -> DiffusionParams:
    """``base`` with what was ``given`` laid over it; where the two contradict each other, ``base`` gives way.

    Raises ValueError where two of the given contradict each other. ``label`` stands before their names there.
    """
    asked, given = given, PRESETS.get(given.get("preset", ""), {}) | dict(given)
    if base.strategy == BLOCK:
        given.setdefault("strategy", BLOCK)
    values = {name: getattr(base, name) for name in PARAMETERS}
    values |= {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    for first, second in GIVES_WAY:
        if second in given and first not in given:
            values[first] = getattr(NEUTRAL, first)
    for conflict in CONFLICTS:
        if not conflict.holds(values):
            continue
        if conflict.first in given and conflict.second in given:
            _refuse(asked, given, conflict.first, conflict.second, conflict.reason, label)
        if conflict.second in given:
            values[conflict.first] = getattr(NEUTRAL, conflict.first)
        else:
            values[conflict.second] = conflict.second_instead(values)
    if (values["strategy"] == BLOCK) != (base.strategy == BLOCK):
        of_block = [name for name in ("strategy", "preset", *_OF_BLOCK) if name in given]
        got = ", ".join(f"{label}{name}={shown(given[name])}" for name in of_block)
        raise ValueError(
            f"{label}strategy must be 'block' for a model trained under block-causal attention, and for no other: this model's "
            f"is {shown(base.strategy)}, got {got}; leave it out"
        )
    template = given.get("template")
    if template and HOLE not in template:
        raise ValueError(
            f"{label}template has no hole, got {shown(template)}: put {HOLE} where a token is wanted, or ask for no generation"
        )
    if template and given.get("canvas_length", len(template)) != len(template):
        _refuse(asked, given, "template", "canvas_length", "the template is the canvas", label)
    return DiffusionParams(**values)


def _refuse(
    asked: Mapping[str, Any], given: Mapping[str, Any], first: str, second: str, reason: str, label: str
) -> None:
    """``asked``: what the user wrote, of which ``given`` holds what a preset stands for, and this model's strategy, too."""
    words, remedy = [], "leave one of them out"
    for name in (first, second):
        if name in asked or name not in given:
            words.append(f"{label}{name}={shown(given[name])}")
        elif name == "strategy":
            words.append(f"this model's strategy {shown(given[name])}")
            remedy = f"leave {label}{second} out"
        else:
            words.append(f"{label}preset={shown(given['preset'])}, which has {name} {shown(given[name])},")
    raise ValueError(f"{' and '.join(words)} exclude each other: {reason}; {remedy}")

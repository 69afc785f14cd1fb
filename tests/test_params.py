"""Every rule of the parameters: what is taken, what is refused and in which words. Pure: no engine, no vLLM."""

import itertools
import math
import re
from dataclasses import fields, replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_plugin import extras as extras_
from dllm_plugin.extras import apply_engine_settings, check_engine_settings, engine_settings, parse_request
from dllm_plugin.families import FAMILIES, Family
from dllm_plugin.messages import shown
from dllm_plugin.params import CONFLICTS, PREFIX, PROFILES, RULES, DiffusionParams
from dllm_plugin.policies import POLICIES

NEUTRAL = DiffusionParams()
BLOCK = DiffusionParams(strategy="block", block_length=4)  # of a family under block-causal attention
OF_BLOCK = ("block_steps", "sub_block_length", "entropy_bound", "edit_threshold", "preset")
VOCABULARY, LONGEST = 1000, 2048  # of the model that requests are for


def parse_engine_defaults(settings, base):
    return apply_engine_settings(check_engine_settings(settings), base)


check_request = partial(extras_.check_request, vocab_size=VOCABULARY, max_model_len=LONGEST)
NAN, INF = math.nan, math.inf

# Values each parameter takes, and values it does not. The ranges are those of the documentation, written out again.
_COUNT = ([1, 7, 1_000_000], [0, -1, 1_000_001, 2.0, 1.5, "8", True, None, [8], 10**400])
_SHARE = ([0, 0.0, 0.5, 1, 1.0], [-0.1, 1.1, NAN, INF, -INF, "0.5", True, False, None, [0.5]])
_NOT_NEGATIVE = ([0, 0.0, 0.3, 5, 1e6], [-1, -1e-9, NAN, INF, "1", True, None, [1.0]])
_CHOICE_WRONG = ["", "NONE", "nothing", 0, 1, True, None, ["none"]]
VALUES = {
    "profile": (["exact", "balanced", "fast"], ["Exact", "slow", *_CHOICE_WRONG]),
    "steps": _COUNT,
    "block_length": _COUNT,
    "canvas_length": _COUNT,
    "remasking": (list(POLICIES), ["lowconfidence", "Entropy", *_CHOICE_WRONG]),
    "threshold": _SHARE,
    "factor": ([0.1, 1, 3.5], [0, 0.0, -1, NAN, INF, "1", True, None]),
    "alg_temp": _NOT_NEGATIVE,
    "eps": ([0, 0.0, 1e-3, 0.999], [1, 1.0, -0.1, NAN, INF, "0.1", True, None]),
    "cfg_scale": _NOT_NEGATIVE,
    "eos_suppression": (list(RULES["eos_suppression"].choices), _CHOICE_WRONG),
    "max_steps": _COUNT,
    "cache": (list(RULES["cache"].choices), _CHOICE_WRONG),
    "cache_refresh": ([0, 1, 1_000_000], [-1, 1_000_001, 1.0, "1", True, None]),
    "prompt_refresh": ([0, 1, 1_000_000], [-1, 1_000_001, 1.0, "1", True, None]),
    "refresh_window": ([0, 1, 1_000_000], [-1, 1_000_001, 1.0, "1", True, None]),
    "strategy": (["full", "d2f"], _CHOICE_WRONG),
    "block_steps": _COUNT,
    "sub_block_length": _COUNT,
    "entropy_bound": ([0.1, 1, 3.5], [0, 0.0, -1, NAN, INF, "1", True, None]),
    "edit_threshold": _NOT_NEGATIVE,
    "max_post_steps": ([0, 1, 1_000_000], [-1, 1_000_001, 1.0, "1", True, None]),
    "preset": (["quality", "speed"], _CHOICE_WRONG),
    "confidence": (["plain", "tempered", "filtered"], _CHOICE_WRONG),
    "d2f_add_threshold": _SHARE,
    "d2f_complete_threshold": _SHARE,
    "d2f_accept_threshold": _SHARE,
    "d2f_max_blocks": ([0, 4], [-1, 0.0, "4", True, None]),
    "suffix": (["text", [1, 2], (0,)], ["", [], 5, True, None, [-1], [1.0], ["a"], [True]]),
    "template": ([[-1], [5, -1, 7], (-1, 0)], ["text", [], -1, None, [-2, -1], [1.5, -1], [True, -1], ["-1"]]),
    "trajectory": ([0, 1], [2, -1, True, 1.0, "1", None]),
    "likelihood_start": ([0, 5, -3, 1_000_000], [0.5, "1", True, None, 1_000_001, -1_000_001]),
    "likelihood_samples": ([0, 1, 128], [-1, 0.5, "1", True, None, 1_000_001]),
}


def rows(index):
    return [
        pytest.param(name, value, id=f"{name}={value!r:.24}") for name, both in VALUES.items() for value in both[index]
    ]


def test_every_parameter_has_values_here():
    assert set(VALUES) == set(RULES) == {field.name for field in fields(DiffusionParams)}


@pytest.mark.parametrize("name, value", rows(0))
def test_taken(name, value):
    extras, base = {PREFIX + name: value}, BLOCK if name in OF_BLOCK else NEUTRAL
    check_request(extras, max_tokens=16, defaults=base)
    taken = getattr(parse_request(extras, base), name)
    assert taken == (tuple(value) if isinstance(value, list) else value)
    assert getattr(parse_engine_defaults({name: value}, base), name) == taken


@pytest.mark.parametrize("name, value", rows(1))
def test_refused(name, value):
    """With the name as the user wrote it, the rule, and the value."""
    for call, label in (
        (lambda: check_request({PREFIX + name: value}, 16), PREFIX + name),
        (lambda: parse_request({PREFIX + name: value}, NEUTRAL), PREFIX + name),
        (lambda: parse_engine_defaults({name: value}, NEUTRAL), f'--additional-config {{"diffusion": ...}} {name}'),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith(f"{label} must be {RULES[name]}, got {shown(value)}; ")


@pytest.mark.parametrize(
    "name, rule",
    [
        ("steps", "an integer of at least 1"),
        ("remasking", f"one of {', '.join(map(repr, POLICIES))}"),
        ("alg_temp", "a finite number of at least 0"),
        ("eps", "a finite number in [0, 1)"),
        ("factor", "a finite number greater than 0"),
        ("threshold", "a finite number in [0, 1]"),
    ],
)
def test_rules_in_words(name, rule):
    assert str(RULES[name]) == rule


@pytest.mark.parametrize(
    "name, value, remedy",
    [
        ("steps", "64", "write 64, without quotes"),
        ("steps", 64.0, "write 64, without a fraction"),
        ("steps", "64.0", "write 64, without quotes"),
        ("steps", 0, "leave it out"),
        ("steps", True, "leave it out"),
        ("steps", "many", "leave it out"),
        ("threshold", "0.9", "write 0.9, without quotes"),
        ("block_length", 10**9, "nothing is above 1000000"),
        ("factor", 1e308, "nothing is above 1000000"),
        ("eps", 2, "leave it out for the default 0.001"),
        ("remasking", "entropie", "take one of them (did you mean 'entropy'?)"),
        ("cache", "all", "leave it out for the default 'none'"),
        ("suffix", "\ud800", "leave it out"),
        ("template", [], "leave it out"),
    ],
)
def test_remedies(name, value, remedy):
    with pytest.raises(ValueError) as error:
        check_request({PREFIX + name: value}, 16)
    assert str(error.value).endswith(f"; {remedy}")


@pytest.mark.parametrize("name", ["suffix", "template"])
def test_ids_are_of_the_vocabulary(name):
    check_request({PREFIX + name: [-1, VOCABULARY - 1][name == "suffix" :]}, 16)
    with pytest.raises(ValueError, match=f"diffusion_{name} must hold token ids below .* {VOCABULARY}, got {2**63}"):
        check_request({PREFIX + name: [-1, 2**63][name == "suffix" :]}, 16)


@pytest.mark.parametrize("extras", [{1: 2}, {None: 1}, [1], "abc", 5], ids=str)
def test_extras_are_a_mapping_of_names(extras):
    with pytest.raises(ValueError, match="extra_args must be a mapping of parameter names to values"):
        check_request(extras, 16)


@pytest.mark.parametrize("pace", ["threshold", "factor"])
def test_positions_are_not_drawn_where_a_threshold_takes_them(pace):
    both = {PREFIX + pace: 0.5, "diffusion_alg_temp": 1.0}
    with pytest.raises(ValueError, match="exclude each other"):
        check_request(both, 16)
    drawn, above = DiffusionParams(alg_temp=1.0), DiffusionParams(**{pace: 0.5})
    assert parse_request({PREFIX + pace: 0.5}, drawn).alg_temp == 0
    assert getattr(parse_request({"diffusion_alg_temp": 1.0}, above), pace) is None


# a value of each parameter that some conflict is about, and which two exclude each other, written out again
CONFLICTING = {
    "strategy": "d2f", "threshold": 0.5, "factor": 1.0, "alg_temp": 1.0, "cfg_scale": 1.0, "cache": "dual",
    "suffix": (5,), "template": (-1, 7), "remasking": "entropy", "confidence": "plain",
}  # fmt: skip
EXCLUSIVE = {
    "strategy": {
        "threshold", "factor", "alg_temp", "cfg_scale", "cache", "suffix", "template", "remasking", "confidence"
    },
    "threshold": {"factor", "alg_temp", "remasking"},
    "factor": {"alg_temp", "remasking"},
    "cfg_scale": {"cache"},
}  # fmt: skip
BLOCK_CONFLICTING = {
    "strategy": "full", "block_steps": 2, "sub_block_length": 2, "entropy_bound": 0.5, "edit_threshold": 0.5,
    "threshold": 0.5, "factor": 1.0, "alg_temp": 1.0, "remasking": "topk_margin", "max_post_steps": 3, "template": (-1, 7),
    "confidence": "filtered", "max_steps": 5,
}  # fmt: skip
BLOCK_EXCLUSIVE = {
    "strategy": {"block_steps", "sub_block_length", "entropy_bound", "edit_threshold"},
    "entropy_bound": {"threshold", "factor", "alg_temp", "remasking", "edit_threshold"},
    "edit_threshold": {"sub_block_length", "remasking"},
    "threshold": {"factor", "alg_temp", "remasking"},
    "factor": {"alg_temp", "remasking"},
}


@pytest.mark.parametrize(
    "base, first, second",
    [
        *((NEUTRAL, *two) for two in itertools.combinations(CONFLICTING, 2)),
        *((BLOCK, *two) for two in itertools.combinations(BLOCK_CONFLICTING, 2)),
    ],
    ids=lambda one: one.strategy if isinstance(one, DiffusionParams) else one,
)
def test_which_two_exclude_each_other(base, first, second):
    values, exclusive = (CONFLICTING, EXCLUSIVE) if base is NEUTRAL else (BLOCK_CONFLICTING, BLOCK_EXCLUSIVE)
    both = {PREFIX + name: values[name] for name in (first, second)}
    if second in exclusive.get(first, ()) or first in exclusive.get(second, ()):
        with pytest.raises(ValueError, match="exclude each other"):
            check_request(both, 16, defaults=base)
    elif base is BLOCK and "strategy" in (first, second):
        with pytest.raises(ValueError, match="strategy must be 'block' for a model trained"):
            check_request(both, 16, defaults=base)
    else:
        check_request(both, 16, defaults=base)


@pytest.mark.parametrize(
    "base, extras",
    [(BLOCK, {"strategy": "full"}), (BLOCK, {"strategy": "d2f"}), (NEUTRAL, {"strategy": "block"})]
    + [(NEUTRAL, {name: VALUES[name][0][0]}) for name in OF_BLOCK],
    ids=str,
)
def test_the_strategy_is_the_familys(base, extras):
    """A model trained under block-causal attention has no other, and other models do not have it."""
    (name,) = extras
    for call in (
        lambda: check_request({PREFIX + name: extras[name]}, 16, defaults=base),
        lambda: parse_engine_defaults(extras, base),
    ):
        with pytest.raises(ValueError, match=f"strategy must be 'block' for .*{name}={extras[name]!r}"):
            call()


@pytest.mark.parametrize("name, value", [("steps", 4), ("cfg_scale", 1.0), ("suffix", [5]), ("cache", "prefix")])
def test_what_a_block_cannot_have(name, value):
    with pytest.raises(
        ValueError, match=f"this model's strategy 'block' and diffusion_{name}=.*; leave diffusion_{name} out"
    ):
        check_request({PREFIX + name: value}, 16, defaults=BLOCK)


@pytest.mark.parametrize(
    "given, threshold, edit_threshold",
    [
        ({"preset": "quality"}, 0.7, 0.5),
        ({"preset": "speed"}, 0.5, 0.0),
        ({"preset": "speed", "threshold": 0.6}, 0.6, 0.0),
        ({"preset": "quality", "edit_threshold": 0.9}, 0.7, 0.9),
    ],
)
def test_presets(given, threshold, edit_threshold):
    for resolved in (
        parse_request({PREFIX + name: value for name, value in given.items()}, BLOCK),
        parse_engine_defaults(given, BLOCK),
    ):
        assert (resolved.threshold, resolved.edit_threshold, resolved.strategy) == (threshold, edit_threshold, "block")


@pytest.mark.parametrize("extras", [{"sub_block_length": 4}, {"entropy_bound": 0.5}, {"factor": 1.0}], ids=str)
def test_what_a_preset_stands_for_is_named(extras):
    extras = {PREFIX + name: value for name, value in extras.items()} | {"diffusion_preset": "speed"}
    with pytest.raises(ValueError, match=r"diffusion_preset='speed', which has (edit_)?threshold 0\.[05], "):
        check_request(extras, 16, defaults=BLOCK)


def test_a_template_is_the_canvas():
    template = {"diffusion_template": [-1, 7, -1]}
    check_request(template | {"diffusion_canvas_length": 3}, 16)
    with pytest.raises(ValueError, match=r"diffusion_template=.* and diffusion_canvas_length=4 exclude each other"):
        check_request(template | {"diffusion_canvas_length": 4}, 16)
    # defaults give way, whichever of the two they are
    assert parse_request(template, DiffusionParams(canvas_length=4)).template == (-1, 7, -1)
    assert parse_request({"diffusion_canvas_length": 4}, DiffusionParams(template=(-1, 7, -1))).canvas_length == 4


@pytest.mark.parametrize(
    "conflict",
    [one for one in CONFLICTS if one.second != "strategy" and one.value != "block"],
    ids=lambda one: f"{one.first}-{one.second}",
)
def test_of_two_that_exclude_each_other_the_default_gives_way(conflict):
    is_block = conflict.first in OF_BLOCK
    values, neutral = (BLOCK_CONFLICTING, BLOCK) if is_block else (CONFLICTING, NEUTRAL)
    first, second = ({name: values[name]} for name in (conflict.first, conflict.second))
    with pytest.raises(
        ValueError, match=f"diffusion_{conflict.first}=.* exclude each other: {re.escape(conflict.reason)}"
    ):
        parse_request({PREFIX + name: value for name, value in (first | second).items()}, neutral)
    with pytest.raises(ValueError, match="exclude each other"):
        parse_engine_defaults(first | second, neutral)
    for asked, default in ((first, second), (second, first)):
        (name,) = asked
        resolved = parse_request({PREFIX + name: asked[name]}, replace(neutral, **default))
        assert getattr(resolved, name) == asked[name]
        assert not any(one.holds({each: getattr(resolved, each) for each in RULES}) for one in CONFLICTS)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(sorted(CONFLICTING)), max_size=4),
    st.lists(st.sampled_from(sorted(CONFLICTING)), max_size=4),
)
def test_whatever_the_defaults_a_request_keeps_what_it_gives(defaults, given):
    """It is refused for what it says itself, never for a default."""
    extras = {name: CONFLICTING[name] for name in given}
    try:
        base = parse_engine_defaults({name: CONFLICTING[name] for name in defaults}, NEUTRAL)
        alone = parse_request({PREFIX + name: value for name, value in extras.items()}, NEUTRAL)
    except ValueError:
        return
    resolved = parse_request({PREFIX + name: value for name, value in extras.items()}, base)
    assert all(getattr(resolved, name) == getattr(alone, name) for name in extras)
    assert not any(one.holds({each: getattr(resolved, each) for each in RULES}) for one in CONFLICTS)


def test_steps_that_a_threshold_makes_unused():
    extras = {"diffusion_steps": 2, "diffusion_block_length": 4}
    with pytest.raises(ValueError, match="2 steps cannot unmask 4 blocks"):
        check_request(extras, 16)
    with pytest.raises(ValueError, match="2 steps cannot unmask 4 blocks"):  # the default gives way to the steps
        check_request(extras, 16, defaults=DiffusionParams(threshold=0.9))
    check_request(extras | {"diffusion_threshold": 0.9}, 16)


# ---- keys


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("diffusion_step", "diffusion_steps"),
        ("diffusion_stesp", "diffusion_steps"),
        ("diffusion_blocklength", "diffusion_block_length"),
        ("diffusion_remask", "diffusion_remasking"),
        ("diffusion_algtemp", "diffusion_alg_temp"),
        ("Diffusion_steps", "diffusion_steps"),
        ("diffusion-steps", "diffusion_steps"),
        ("diffusionsteps", "diffusion_steps"),
        ("difusion_steps", "diffusion_steps"),
        ("DIFFUSION_STEPS", "diffusion_steps"),
        ("steps", "diffusion_steps"),  # without the prefix
        ("step", "diffusion_steps"),
        ("block_length", "diffusion_block_length"),
        ("remasking", "diffusion_remasking"),
    ],
)
def test_unknown_keys_name_the_nearest(key, nearest):
    for call in (lambda: check_request({key: 8}, 16), lambda: parse_request({key: 8}, NEUTRAL)):
        with pytest.raises(ValueError) as error:
            call()
        assert f"unknown diffusion parameter {key!r} (did you mean {nearest!r}?)" in str(error.value)
        assert all(PREFIX + name in str(error.value) for name in RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_parameter_without_its_prefix_is_refused(name):
    value = VALUES[name][0][0]
    with pytest.raises(ValueError, match=f"unknown diffusion parameter '{name}'"):
        check_request({name: value}, 16)


@pytest.mark.parametrize("key", ["kv_transfer_params", "priority_class", "user_id", "watermark", "do_remote_decode"])
def test_other_peoples_extras_are_left_alone(key):
    check_request({key: object()}, 16)
    assert parse_request({key: object(), "diffusion_steps": 3}, NEUTRAL) == DiffusionParams(steps=3)


def test_however_many_extras_of_others_cost_next_to_nothing(monkeypatch):
    """Only some that begin as one of ours does are compared with ours."""
    compared = []
    monkeypatch.setattr(extras_.difflib, "get_close_matches", lambda name, *args, **kwargs: compared.append(name) or [])
    check_request({f"b{i}": i for i in range(50_000)} | {"z": 1, "diffusion_steps": 4}, 16)
    assert len(compared) == extras_.MOST_COMPARED
    compared.clear()
    check_request({f"{i}": i for i in range(50_000)} | {"b" * 1_000_000: 1}, 16)
    assert compared == []


def test_a_long_unknown_key_is_cut():
    with pytest.raises(ValueError, match=r"unknown diffusion parameter 'diffusion_x+\.\.\.x+'; known: ") as error:
        check_request({"diffusion_" + "x" * 1_000_000: 1}, 16)
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize("extras", [None, {}])
def test_no_extras_are_the_defaults(extras):
    check_request(extras, None)
    assert parse_request(extras, DiffusionParams(steps=9, eps=0.1)) == DiffusionParams(steps=9, eps=0.1)


# ---- steps and blocks


@pytest.mark.parametrize(
    "extras, max_tokens, blocks",
    [
        ({"steps": 3, "block_length": 4}, 16, 4),
        ({"steps": 1, "block_length": 5}, 11, 3),
        ({"steps": 1, "block_length": 1}, 2, 2),
        ({"steps": 2, "block_length": 4, "canvas_length": 12}, 100, 3),  # of a canvas, not of the response
        ({"steps": 7, "block_length": 128}, None, 8),  # the default canvas
    ],
)
def test_steps_must_reach_every_block(extras, max_tokens, blocks):
    given = {PREFIX + name: value for name, value in extras.items()}
    with pytest.raises(ValueError) as error:
        check_request(given, max_tokens)
    message = str(error.value)
    assert f"{extras['steps']} steps cannot unmask {blocks} blocks of {extras['block_length']} positions" in message
    # the remedies it names are remedies
    assert f"raise diffusion_steps to {blocks}" in message
    check_request(given | {"diffusion_steps": blocks}, max_tokens)
    length = int(message.rpartition(" ")[2])
    assert f"or diffusion_block_length to {length}" in message
    check_request(given | {"diffusion_block_length": length}, max_tokens)


@pytest.mark.parametrize(
    "extras, max_tokens",
    [
        ({"steps": 4, "block_length": 4}, 16),
        ({"steps": 1, "block_length": 64}, 16),
        ({"steps": 1}, 16),
        ({"block_length": 1}, 16),
        ({"steps": 2, "block_length": 4, "canvas_length": 8}, 100),
    ],
)
def test_steps_that_reach_every_block(extras, max_tokens):
    check_request({PREFIX + name: value for name, value in extras.items()}, max_tokens)


def test_a_canvas_that_only_the_prompt_ends():
    """64 blocks of 512 positions, which no sequence has beside a prompt: the plan raises steps that are too few."""
    extras = {"diffusion_steps": 63, "diffusion_block_length": 8}
    for max_tokens in (512, 1000, None):
        extras_.check_request(extras, max_tokens, vocab_size=VOCABULARY, max_model_len=512)


# ---- engine-wide defaults


def test_engine_defaults_are_laid_over_the_familys():
    base = DiffusionParams(remasking="origin")
    defaults = parse_engine_defaults({"steps": 64, "eps": 0.01}, base)
    assert defaults == DiffusionParams(remasking="origin", steps=64, eps=0.01)
    assert parse_request({"diffusion_steps": 8}, defaults) == DiffusionParams(remasking="origin", steps=8, eps=0.01)


@pytest.mark.parametrize("key", ["diffusion_steps", "steps", "difusion", "Diffusion", "diffusions"])
def test_engine_defaults_in_the_wrong_place(key):
    with pytest.raises(ValueError, match=f"unknown key {key!r}; engine-wide defaults go into"):
        engine_settings({key: 64 if key.endswith("steps") else {"steps": 64}})


@pytest.mark.parametrize("others", [{}, {"other_plugin": {"steps": 64}}, {"cache": {}}, None])
def test_settings_of_other_plugins_are_left_alone(others):
    assert engine_settings(others) == {}
    assert engine_settings({**(others or {}), "diffusion": {"steps": 64}}) == {"steps": 64}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stesp": 64}, "unknown parameter 'stesp' (did you mean 'steps'?)"),
        ({"diffusion_steps": 64}, "unknown parameter 'diffusion_steps'"),
        ({"steps": "64"}, "steps must be an integer of at least 1, got '64'"),
        ([("steps", 64)], "must be a mapping of parameter names to values, got [('steps', 64)]"),
        (64, "must be a mapping"),
        (None, "must be a mapping"),
    ],
)
def test_wrong_engine_defaults(settings, message):
    with pytest.raises(ValueError) as error:
        parse_engine_defaults(settings, NEUTRAL)
    assert message in str(error.value) and "--additional-config" in str(error.value)


# ---- profiles

FAMILY_PROFILES = [(family, name) for family in FAMILIES for name in PROFILES]


def exact_of(family: Family) -> DiffusionParams:
    strategy = "block" if family.prefix_stands_alone else "full"
    return replace(family.defaults, profile="exact", strategy=strategy, block_length=family.block_length)


@pytest.mark.parametrize("family, name", FAMILY_PROFILES, ids=lambda value: getattr(value, "name", value))
def test_a_profile_is_what_the_family_says_of_it(family, name):
    exact = exact_of(family)
    params = family.profile(name, exact)
    assert params.profile == name
    if name == "exact":
        assert params == exact
        return
    for parameter, value in family.profiles.get(name, {}).items():
        assert getattr(params, parameter) == value
    assert params.threshold is not None, "one token a step"


CHAT, BLOCKWISE = (
    {"canvas_length": 128, "block_length": 32, "threshold": 0.9},
    ({"threshold": 0.9}, {"threshold": 0.85}),
)
WRITTEN = {  # balanced and fast, as docs/profiles.md has them
    **dict.fromkeys(("LLaDA", "LLaDA-MoE", "Dream"), (CHAT, {**CHAT, "cache": "dual"})),
    **dict.fromkeys(("SDAR", "SDAR-MoE", "Stable-DiffCoder", "DreamReasoner"), BLOCKWISE),
    "LLaDA2": ({}, {"threshold": 0.9}),
    "Fast-dLLM v2": ({"threshold": 0.9}, {"threshold": 0.9, "cache": "dual"}),
}


def test_the_profiles_are_those_of_the_documentation():
    got = {each.name: tuple(dict(each.profiles.get(name, {})) for name in ("balanced", "fast")) for each in FAMILIES}
    assert got == WRITTEN


def test_a_request_takes_its_profile_before_its_own_parameters():
    llada = next(family for family in FAMILIES if family.name == "LLaDA")
    profiles = [llada.profile(name, exact_of(llada)) for name in PROFILES]
    balanced = profiles[1]
    assert parse_request({}, balanced, profiles) == balanced
    fast = parse_request({"diffusion_profile": "fast", "diffusion_block_length": 8}, balanced, profiles)
    assert (fast.cache, fast.threshold, fast.block_length) == ("dual", 0.9, 8)
    exact = parse_request({"diffusion_profile": "exact"}, balanced, profiles)
    assert exact == replace(NEUTRAL, profile="exact")
    guided = parse_request({"diffusion_profile": "fast", "diffusion_cfg_scale": 1.0}, balanced, profiles)
    assert (guided.cache, guided.threshold) == ("none", 0.9), "the profile gives way"


def test_steps_are_not_lost_on_the_threshold_of_a_profile():
    base = DiffusionParams(threshold=0.9, factor=None)
    assert parse_request({"diffusion_steps": 8}, base).threshold is None
    both = parse_request({"diffusion_steps": 8, "diffusion_threshold": 0.5}, base)
    assert (both.steps, both.threshold) == (8, 0.5)
    assert parse_request({"diffusion_steps": 8}, DiffusionParams(factor=1.0)).factor is None


def test_d2f_has_profiles_of_its_own():
    llada = next(family for family in FAMILIES if family.name == "LLaDA")
    exact = replace(exact_of(llada), strategy="d2f")
    fast = llada.profile("fast", exact)
    assert (fast.strategy, fast.threshold, fast.cache) == ("d2f", None, "none")
    assert fast.d2f_accept_threshold < exact.d2f_accept_threshold

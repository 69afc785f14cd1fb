"""What an engine refuses or puts right when it starts: engine-wide defaults, and settings of vLLM that do not fit."""

from types import SimpleNamespace

import pytest
from support.cases import PolicyCase, difference
from support.engines import drive, engine, num_forwards
from support.errors import PROMPT, engine_with, serves
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from dllm_plugin import admission, engine_config
from dllm_plugin.families import ARCHITECTURES, family_of
from dllm_plugin.params import DiffusionParams
from dllm_plugin.settings import EngineSettings

SETTINGS = EngineSettings("LLaDAModelLM", DiffusionParams(), 331, 512, 2048, -1, True)


# ---- engine-wide defaults


def test_engine_wide_defaults_are_used():
    settings = {"diffusion": {"steps": 4, "remasking": "entropy", "canvas_length": 12}}
    llm = engine_with("llada", additional_config=settings)
    plain = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    own = SamplingParams(
        temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False, extra_args={"diffusion_steps": 12}
    )
    outputs, _ = drive(llm, [(PROMPT, plain), (PROMPT, own)])
    cases = [PolicyCase("llada", "entropy", 16, steps=steps, prompt=tuple(PROMPT), canvas=12) for steps in (4, 12)]
    assert [difference(case, output) for case, output in zip(cases, outputs, strict=True)] == ["", ""]
    assert [num_forwards(output) for output in outputs] == [6, 14]


@pytest.mark.parametrize("checkpoint, policy", [("llada", "low_confidence"), ("dream", "origin")])
def test_defaults_of_the_families(checkpoint, policy):
    """A request that says nothing is decoded greedily, as the family's reference does by default."""
    llm = engine(checkpoint)
    case = PolicyCase(checkpoint, policy, 10, prompt=tuple(PROMPT))
    params = llm.get_default_sampling_params()
    params.max_tokens, params.ignore_eos, params.detokenize, params.seed = 10, True, False, case.seed
    assert params.temperature == 0.0
    assert not difference(case, drive(llm, [(PROMPT, params)])[0][0])


@pytest.mark.parametrize(
    "diffusion, message",
    [
        ({"stesp": 4}, "unknown parameter 'stesp' (did you mean 'steps'?)"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        (64, "must be a mapping of parameter names to values, got 64"),
        ({"suffix": [5, 5000]}, "suffix must hold token ids below the vocabulary's size 331, got 5000"),
    ],
)
def test_wrong_engine_wide_defaults_stop_the_start(diffusion, message):
    with pytest.raises(Exception) as error:
        engine_with("llada", additional_config={"diffusion": diffusion})
    assert message in str(error.value)
    serves(engine("llada"))


def test_an_engine_of_d2f_has_the_profiles_of_d2f():
    """A threshold, or a cache, would contradict the strategy that the operator has set."""
    llm = engine_with("llada", additional_config={"diffusion": {"strategy": "d2f", "profile": "fast"}})
    settings = llm.llm_engine.model_config.diffusion
    assert [each.profile for each in settings.profiles] == ["fast", "exact", "balanced"]
    for each in settings.profiles:
        assert (each.strategy, each.threshold, each.cache) == ("d2f", None, "none")
    assert [each.d2f_accept_threshold for each in settings.profiles] == [0.8, 0.9, 0.9]


# ---- engine configurations


def config(**changes):
    """As much of a VllmConfig as the checks read; `a__b` sets b of its part a."""
    settings = {
        "model_config": SimpleNamespace(
            architecture="LLaDAModelLM",
            max_model_len=1000,
            runner_type="generate",
            enable_prompt_embeds=False,
            logits_processors=None,
        ),
        "parallel_config": SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_expert_parallel=False,
            enable_eplb=False,
            expert_placement_strategy="linear",
            data_parallel_size=1,
            tensor_parallel_size=2,
            world_size=1,
            worker_cls="auto",
        ),
        "cache_config": SimpleNamespace(cache_dtype="auto", enable_prefix_caching=False, kv_offloading_size=None),
        "scheduler_config": SimpleNamespace(
            scheduler_cls=None,
            async_scheduling=None,
            max_num_batched_tokens=1000,
            max_num_scheduled_tokens=None,
            prefill_schedule_interval=1,
        ),
        "speculative_config": None,
        "kv_transfer_config": None,
        "lora_config": None,
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            setattr(settings[part], name, value)
        else:
            settings[part] = value
    return SimpleNamespace(**settings)


REFUSED = {
    "speculative": ({"speculative_config": object()}, "remove --speculative-config"),
    "pipeline": ({"parallel_config__pipeline_parallel_size": 2}, "got pipeline_parallel_size=2; use --tensor-parallel"),
    "decode-context": ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism is not supported"),
    "prefill-context": ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism is not supported"),
    "expert-parallel": (
        {"parallel_config__enable_expert_parallel": True, "parallel_config__data_parallel_size": 3},
        "got data_parallel_size=3, and engines share nothing; remove --enable-expert-parallel",
    ),
    "expert-balancing": ({"parallel_config__enable_eplb": True}, "remove --enable-eplb"),
    "expert-placement": (
        {"parallel_config__expert_placement_strategy": "round_robin"},
        "got expert_placement_strategy='round_robin'; remove --expert-placement-strategy",
    ),
    "kv-cache-dtype": ({"cache_config__cache_dtype": "fp8"}, "got kv_cache_dtype='fp8'; remove --kv-cache-dtype"),
    "prefix-caching": ({"cache_config__enable_prefix_caching": True}, "remove --enable-prefix-caching"),
    "kv-transfer": ({"kv_transfer_config": object()}, "remove --kv-transfer-config"),
    "kv-offloading": ({"cache_config__kv_offloading_size": 1.0}, "remove --kv-offloading-size"),
    "pooling": ({"model_config__runner_type": "pooling"}, "got runner='pooling'; remove --runner"),
    "prompt-embeds": ({"model_config__enable_prompt_embeds": True}, "remove --enable-prompt-embeds"),
    "logits-processors": ({"model_config__logits_processors": ["my:Own"]}, "['my:Own']; remove --logits-processors"),
    "worker": ({"parallel_config__worker_cls": "my.Worker"}, "got worker_cls='my.Worker'; remove --worker-cls"),
    "scheduler": ({"scheduler_config__scheduler_cls": "my.S"}, "got scheduler_cls='my.S'; remove --scheduler-cls"),
    "prefill-interval": (
        {"scheduler_config__prefill_schedule_interval": 2},
        "got prefill_schedule_interval=2; remove --prefill-schedule-interval",
    ),
    "async": ({"scheduler_config__async_scheduling": True}, "remove --async-scheduling"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_configurations(name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        engine_config.refuse_what_does_not_fit(config(**changes))
    assert str(error.value).startswith("dllm_plugin: ") and message in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel_config__worker_cls": engine_config.WORKER},
        {"parallel_config__enable_expert_parallel": True},
        {"parallel_config__data_parallel_size": 3},
        {"scheduler_config__scheduler_cls": engine_config.SCHEDULER},
        {"scheduler_config__async_scheduling": False},
        {"model_config__logits_processors": [admission.admission_for(SETTINGS)]},
    ],
    ids=str,
)
def test_configurations_that_fit(changes):
    engine_config.refuse_what_does_not_fit(config(**changes))


@pytest.mark.parametrize("budget, length, most", [(1000, 1000, 2000), (5000, 1000, 5000), (20000, 20000, 20000)])
def test_a_guided_sequence_may_exceed_the_budget(budget, length, most):
    """Up to 8,192 tokens and their copy; above that, half of the budget is for each."""
    parts = {"scheduler_config__max_num_batched_tokens": budget, "model_config__max_model_len": length}
    assert engine_config.most_tokens_of_a_step(config(**parts)) == most


@pytest.mark.parametrize("scheduled, fits", [(None, True), (1000, True), (999, False), (32, False)])
def test_what_is_scheduled_at_once_holds_a_sequence(scheduled, fits):
    """vLLM would leave a longer prompt waiting, and all behind it."""
    vllm_config = config(scheduler_config__max_num_scheduled_tokens=scheduled)
    if fits:
        engine_config.fit_token_budget(vllm_config)
    else:
        with pytest.raises(ValueError, match=f"max_num_scheduled_tokens .* got {scheduled} with max_model_len 1000"):
            engine_config.fit_token_budget(vllm_config)


@pytest.mark.parametrize("budget, fits", [(1000, True), (1001, True), (999, False), (64, False)])
def test_token_budget_holds_a_sequence(budget, fits):
    vllm_config = config(scheduler_config__max_num_batched_tokens=budget)
    if fits:
        engine_config.fit_token_budget(vllm_config)
        assert vllm_config.scheduler_config.max_num_batched_tokens == budget
    else:
        with pytest.raises(ValueError) as error:
            engine_config.fit_token_budget(vllm_config)
        assert f"got {budget} with max_model_len 1000" in str(error.value)
        assert "raise --max-num-batched-tokens to 1000 or lower --max-model-len" in str(error.value)


def test_vllms_own_default_token_budget_is_raised():
    for budget in EngineArgs.get_batch_defaults(1)[0].values():
        vllm_config = config(
            scheduler_config__max_num_batched_tokens=budget, model_config__max_model_len=budget + 1
        )  # fmt: skip
        engine_config.fit_token_budget(vllm_config)
        assert vllm_config.scheduler_config.max_num_batched_tokens == budget + 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_num_batched_tokens": 100}, "got 100 with max_model_len 512; raise --max-num-batched-tokens to 512"),
        ({"async_scheduling": True}, "remove --async-scheduling"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "remove --worker-cls"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "remove --scheduler-cls"),
        ({"kv_cache_dtype": "fp8"}, "remove --kv-cache-dtype"),
        ({"enable_prefix_caching": True}, "remove --enable-prefix-caching"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "remove --speculative-config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_by_a_real_start(settings, message):
    with pytest.raises(Exception) as error:
        engine_with("llada", **settings)
    assert message in str(error.value)


@pytest.mark.parametrize("settings", [{}, {"enable_prefix_caching": False, "enable_chunked_prefill": True}], ids=str)
def test_prefix_caching_and_chunked_prefill_are_off(settings):
    """Full attention has no prefix that stands for itself: a prompt that comes again is computed again, in one piece."""
    llm = engine_with("llada", **settings)
    vllm_config = llm.llm_engine.vllm_config
    assert not vllm_config.cache_config.enable_prefix_caching
    assert not vllm_config.scheduler_config.enable_chunked_prefill
    case = PolicyCase("llada", "low_confidence", 6, prompt=300)
    for _ in range(2):
        assert not difference(case, drive(llm, [case.request])[0][0])


@pytest.mark.parametrize(
    "settings, wanted",
    [({}, True), ({"enforce_eager": True}, False), ({"compilation_config": {"cudagraph_mode": "NONE"}}, False)],
    ids=str,
)
def test_who_switches_graphs_off_has_none(settings, wanted):
    """vLLM's own are off for everyone, so that its flag would not say any more who asked."""
    model_config = engine_with("llada", **settings).llm_engine.vllm_config.model_config
    assert model_config.enforce_eager
    assert model_config.diffusion.records_graphs is wanted


def test_our_worker_with_another_model():
    """Its scheduler would be vLLM's own: the worker refuses before it loads anything."""
    from dllm_plugin.worker import DiffusionWorker

    with pytest.raises(ValueError) as error:
        DiffusionWorker(SimpleNamespace(model_config=SimpleNamespace(architecture="LlamaForCausalLM")))
    assert "LlamaForCausalLM is not a diffusion language model" in str(error.value)
    assert "serve it without --worker-cls dllm_plugin.worker.DiffusionWorker" in str(error.value)


def test_family_of_names_the_families():
    with pytest.raises(ValueError) as error:
        family_of("GPT2LMHeadModel")
    assert all(name in str(error.value) for name in ARCHITECTURES)

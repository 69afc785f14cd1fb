"""What vLLM's configuration must be for a diffusion language model: set where unset, refused where it does not fit."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import ModelConfig, ParallelConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from dllm_plugin.admission import UNSUPPORTED, DiffusionAdmission, admission_for
from dllm_plugin.extras import (
    ENGINE_WIDE,
    apply_engine_settings,
    check_engine_settings,
    check_token_ids,
    engine_settings,
)
from dllm_plugin.families import family_of
from dllm_plugin.messages import shown
from dllm_plugin.params import BLOCK, DEFAULT_PROFILE, PROFILES, DiffusionParams
from dllm_plugin.plugin import TOKENIZER_MODE
from dllm_plugin.settings import EngineSettings, model_config_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm." + __name__)

WORKER = "dllm_plugin.worker.DiffusionWorker"
SCHEDULER = "dllm_plugin.scheduler.scheduler.DiffusionScheduler"
LONGEST_GUIDED = 8192  # tokens of a sequence whose second copy there is always memory for
DEFAULT_CPU_PAGE = 128  # positions in a page of the KV cache, where vLLM chooses


def engine_profiles(vllm_config: "VllmConfig") -> dict[str, DiffusionParams]:
    """Decoding parameters of a request by its profile: the family's, then those of ``--additional-config``.

    The first is that of a request which names none.
    """
    model = vllm_config.model_config
    family = family_of(model.architecture)
    given = check_engine_settings(engine_settings(vllm_config.additional_config))
    exact = replace(family.defaults, profile="exact")
    if family.attention == "block_causal":
        exact = replace(exact, strategy=BLOCK, block_length=model.hf_config.block_length, confidence="tempered")
    elif given.get("strategy") == "d2f":
        exact = apply_engine_settings({"strategy": "d2f"}, exact)
    chosen = given.pop("profile", DEFAULT_PROFILE)
    if isinstance(given.get("suffix"), str):
        given["suffix"] = suffix_ids(model, given["suffix"])
    names = sorted(PROFILES, key=lambda name: name != chosen)
    profiles = {name: apply_engine_settings(given, family.profile(name, exact)) for name in names}
    check_token_ids(profiles[chosen], model.get_vocab_size(), f"{ENGINE_WIDE} ")
    return profiles


def suffix_ids(model: ModelConfig, text: str) -> list[int]:
    from vllm.tokenizers import cached_tokenizer_from_config

    if model.skip_tokenizer_init:
        raise ValueError(
            f"{ENGINE_WIDE} suffix as text needs a tokenizer, and skip_tokenizer_init is set; give token ids"
        )
    return cached_tokenizer_from_config(model).encode(text, add_special_tokens=False)


class DiffusionModelConfig(ModelConfig):
    """vLLM's model config with what we have resolved. Prefix caching is on by itself only where prefixes stand alone."""

    diffusion: EngineSettings
    engine: ParallelConfig
    dtype: torch.dtype  # vLLM has resolved what the user wrote

    @property
    def is_moe(self) -> bool:
        """False where several engines share the load: vLLM would have them step together, and ours never wait for each other.

        In the process of one engine vLLM has set ``data_parallel_size`` back to 1.
        """
        alone = not hasattr(self, "engine") or self.engine.data_parallel_size == 1
        return alone and super().is_moe

    @property
    def is_prefix_caching_supported(self) -> bool:
        return family_of(self.architecture).prefix_stands_alone

    def try_get_generation_config(self) -> dict[str, Any]:
        """That of the checkpoint. Under block-causal attention the end of turn ends an answer whether it says so or not."""
        config = super().try_get_generation_config()
        turn_end = self.diffusion.turn_end_token_id if hasattr(self, "diffusion") else -1
        if self.generation_config == "vllm" or turn_end < 0 or not family_of(self.architecture).prefix_stands_alone:
            return config
        ends = config.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return config | {"eos_token_id": [*ends, *({turn_end} - {*ends})]}


class DiffusionEngineConfig(VerifyAndUpdateConfig):
    """Hooks of vLLM's MODELS_CONFIG_MAP, which run for our architectures before worker and scheduler are chosen."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Runs before vLLM puts its own values for what the user left open."""
        model_config.__class__ = DiffusionModelConfig
        own = family_of(model_config.architecture).config_class
        if type(model_config.hf_config) is not own:
            model_config.hf_config = model_config.hf_text_config = read_again(model_config, own)
            model_config.model_arch_config = model_config.get_model_arch_config()

    @classmethod
    def verify_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Select our scheduler, worker and admission check. Raises ValueError for a setting that does not fit."""
        model = model_config_of(vllm_config)
        model.engine = vllm_config.parallel_config
        model.hf_config.check()
        refuse_what_does_not_fit(vllm_config)
        profiles = tuple(engine_profiles(vllm_config).values())  # a wrong one stops start-up, not the first request
        fit_token_budget(vllm_config)
        fit_cpu_memory(vllm_config)
        model.diffusion = EngineSettings(
            architecture=model.architecture,
            defaults=profiles[0],
            vocab_size=model.get_vocab_size(),
            max_model_len=model.max_model_len,
            most_tokens=most_tokens_of_a_step(vllm_config),
            turn_end_token_id=turn_end_token_id(vllm_config),
            records_graphs=not graphs_are_off(vllm_config),
            profiles=profiles,
        )
        select_components(vllm_config)


def read_again(model: ModelConfig, own: Any) -> Any:
    """The family's own config, where it was not the architecture that chose one.

    Stable-DiffCoder's ``model_type`` is Llama's, of which transformers has a class; and an override may name another
    architecture than config.json.
    """
    path = model.hf_config_path or model.model
    values, _ = own.get_config_dict(path, revision=model.revision, token=model.hf_token)
    if (quantization := getattr(model.hf_config, "quantization_config", None)) is not None:
        values["quantization_config"] = quantization  # vLLM finds it in files of other names, too
    if callable(model.hf_overrides):
        return model.hf_overrides(own(**values))
    return own(**values | model.hf_overrides)


def refuse_what_does_not_fit(vllm_config: "VllmConfig") -> None:
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    scheduler = vllm_config.scheduler_config
    known = [isinstance(each, type) and issubclass(each, DiffusionAdmission) for each in model.logits_processors or ()]
    alone = family_of(model.architecture).prefix_stands_alone
    stages, held_back = parallel.pipeline_parallel_size, scheduler.prefill_schedule_interval
    engines, placement = parallel.data_parallel_size, parallel.expert_placement_strategy
    refusals = {
        "speculative decoding needs left-to-right drafts, and a diffusion model unmasks in any order; remove "
        "--speculative-config": vllm_config.speculative_config is not None,
        f"pipeline parallelism is not supported, got pipeline_parallel_size={stages}; use --tensor-parallel-size "
        "instead": stages > 1,
        "context parallelism is not supported; leave --decode-context-parallel-size and --prefill-context-parallel-size "
        "at 1": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        f"the KV cache keeps the model's dtype, got kv_cache_dtype={shown(cache.cache_dtype)}; remove --kv-cache-dtype": (
            cache.cache_dtype != "auto"
        ),
        "prefix caching assumes causal attention: under full attention no prefix of a sequence stands for itself; remove "
        "--enable-prefix-caching": cache.enable_prefix_caching and not alone,
        "KV connectors assume causal attention; remove --kv-transfer-config": (
            vllm_config.kv_transfer_config is not None
        ),
        "KV offloading assumes causal attention; remove --kv-offloading-size": cache.kv_offloading_size is not None,
        f"a diffusion model generates text, got runner={shown(model.runner_type)}; remove --runner": (
            model.runner_type != "generate"
        ),
        f"expert parallelism is among the ranks of one engine, got data_parallel_size={engines}, and engines share nothing; "
        "remove --enable-expert-parallel or --data-parallel-size": parallel.enable_expert_parallel and engines > 1,
        "experts are never moved from rank to rank; remove --enable-eplb": parallel.enable_eplb,
        f"experts follow each other on a rank, got expert_placement_strategy={shown(placement)}; remove "
        "--expert-placement-strategy": placement != "linear",
        "prompts are token ids, whose masks and positions the canvas keeps; remove --enable-prompt-embeds": (
            model.enable_prompt_embeds
        ),
        f"logits processors assume left-to-right generation, got {model.logits_processors}; remove --logits-processors": (
            not all(known)
        ),
        f"{model.architecture} is served by {WORKER}, got worker_cls={shown(parallel.worker_cls)}; remove --worker-cls": (
            parallel.worker_cls not in ("auto", WORKER)
        ),
        f"{model.architecture} is scheduled by {SCHEDULER}, got scheduler_cls={shown(scheduler.scheduler_cls)}; remove "
        "--scheduler-cls": scheduler.scheduler_cls not in (None, SCHEDULER),
        f"a diffusion model has no prefill to hold back, got prefill_schedule_interval={held_back}; remove "
        "--prefill-schedule-interval": held_back > 1,
        "async scheduling is not supported: a window depends on the step before it; remove --async-scheduling": (
            scheduler.async_scheduling is True
        ),
    }
    for message, refused in refusals.items():
        if refused:
            raise ValueError(f"dllm_plugin: {message}")


def fit_token_budget(vllm_config: "VllmConfig") -> None:
    """Make the token budget of a step hold the longest sequence: a window under full attention is never chunked."""
    from vllm.engine.arg_utils import EngineArgs

    if family_of(vllm_config.model_config.architecture).prefix_stands_alone:
        return
    scheduler, max_model_len = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    if scheduler.max_num_scheduled_tokens is not None and scheduler.max_num_scheduled_tokens < max_model_len:
        raise ValueError(
            f"dllm_plugin: max_num_scheduled_tokens must hold a whole sequence, got {scheduler.max_num_scheduled_tokens} "
            f"with max_model_len {max_model_len}; remove it, or lower --max-model-len"
        )
    budget = scheduler.max_num_batched_tokens
    if budget >= max_model_len:
        return
    # vLLM does not say whether the user gave the number; its own defaults are raised, anything else is refused
    if budget not in EngineArgs.get_batch_defaults(vllm_config.parallel_config.world_size)[0].values():
        raise ValueError(
            f"dllm_plugin: max_num_batched_tokens must hold a whole sequence, because every step forwards prompt and "
            f"canvas together: got {budget} with max_model_len {max_model_len}; raise --max-num-batched-tokens to "
            f"{max_model_len} or lower --max-model-len"
        )
    logger.info("Raising max_num_batched_tokens from its default %d to max_model_len %d.", budget, max_model_len)
    scheduler.max_num_batched_tokens = max_model_len


def most_tokens_of_a_step(vllm_config: "VllmConfig") -> int:
    """Tokens that a step forwards at most: the budget, or those of one guided sequence, which runs alone above it."""
    budget = vllm_config.scheduler_config.max_num_batched_tokens
    return max(budget, 2 * min(vllm_config.model_config.max_model_len, LONGEST_GUIDED))


def fit_cpu_memory(vllm_config: "VllmConfig") -> None:
    """On a CPU, where nothing else is said, give the KV cache what the engine can use, and at most 4 GiB.

    vLLM would take 92 % of the machine's memory, which does not even start where something else runs.
    """
    from vllm.config import CacheConfig
    from vllm.platforms import current_platform

    cache, model, parallel = vllm_config.cache_config, model_config_of(vllm_config), vllm_config.parallel_config
    unset = cache.kv_cache_memory_bytes is None
    if not (current_platform.is_cpu() and unset and cache.gpu_memory_utilization == CacheConfig.gpu_memory_utilization):
        return
    token_bytes = 2 * model.get_num_kv_heads(parallel) * model.get_head_size() * model.dtype.itemsize
    # pages are whole: the last one of a sequence is counted in full
    sequence_bytes = token_bytes * model.get_num_layers(parallel) * (model.max_model_len + DEFAULT_CPU_PAGE)
    most = sequence_bytes * (vllm_config.scheduler_config.max_num_seqs + 1)
    cache.kv_cache_memory_bytes = max(sequence_bytes * 2, min(most, 4 << 30))


def select_components(vllm_config: "VllmConfig") -> None:
    """Set every field explicitly: on CUDA an unset ``async_scheduling`` would become True."""
    from dllm_plugin.front_end import complete_requests

    scheduler, model = vllm_config.scheduler_config, model_config_of(vllm_config)
    vllm_config.parallel_config.worker_cls = WORKER
    scheduler.scheduler_cls = SCHEDULER
    scheduler.async_scheduling = False
    scheduler.enable_chunked_prefill = False
    scheduler.long_prefill_token_threshold = 0
    # worker/graphs.py has our own graphs; vLLM's, and its compilation, must not know of the model
    model.enforce_eager = True
    model.logits_processors = [admission_for(model.diffusion)]
    complete_requests()
    if model.tokenizer_mode in ("auto", "hf"):
        model.tokenizer_mode = TOKENIZER_MODE  # the same tokenizer, and the renderer that checks prompts
    select_sampling_defaults(model)


def select_sampling_defaults(model: ModelConfig) -> None:
    """The reference decoders' temperature where generation_config.json names none, and no penalty that they do not apply.

    Some checkpoints inherit a repetition penalty from the model they were made of. None of the families' decoders applies one,
    so it is left to those who ask for it.
    """
    overrides = model.override_generation_config
    published = {} if model.generation_config == "vllm" else model.try_get_generation_config()
    if model.generation_config != "vllm" and published.get("temperature") is None:
        overrides.setdefault("temperature", 0.0)
    for name, neutral, remedy in UNSUPPORTED:
        if overrides.get(name) not in (*neutral, None):
            raise ValueError(
                f"dllm_plugin: {name} is not supported with diffusion language models, got override_generation_config "
                f"with {name}={shown(overrides[name])}; remove it ({remedy})"
            )
        if published.get(name) not in (*neutral, None):
            logger.warning("Ignoring %s=%r of generation_config.json: %s.", name, published[name], remedy)
            overrides[name] = neutral[0]
    if published.get("repetition_penalty") not in (1, None) and "repetition_penalty" not in overrides:
        logger.warning(
            "Ignoring repetition_penalty=%r of generation_config.json, which the model's own decoder does not apply: give it "
            "in a request, or in override_generation_config.",
            published["repetition_penalty"],
        )
        overrides["repetition_penalty"] = 1.0


def graphs_are_off(vllm_config: "VllmConfig") -> bool:
    """Whether the user switched them off, which is read before ``enforce_eager`` switches vLLM's own off."""
    from vllm.config import CUDAGraphMode

    model = vllm_config.model_config
    if seen := getattr(model, "diffusion", None):  # the hook may run again over its own settings
        return not seen.records_graphs
    return model.enforce_eager or vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE


def turn_end_token_id(vllm_config: "VllmConfig") -> int:
    """Of the family's end-of-turn token; -1 if there is none. Published configs do not name it, the tokenizer does."""
    model = vllm_config.model_config
    turn_end = getattr(model.hf_config, "eot_token_id", None)
    if turn_end is None and not model.skip_tokenizer_init:
        from vllm.tokenizers import cached_tokenizer_from_config

        turn_end = cached_tokenizer_from_config(model).get_vocab().get(family_of(model.architecture).turn_end)
    return -1 if turn_end is None else turn_end

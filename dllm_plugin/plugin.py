"""What ``register`` does, once its process imports vLLM: configs, architectures, tokenizer, renderer, config hook."""

from dllm_plugin.compat import check_vllm_version

TOKENIZER_MODE = "dllm_plugin"  # by which vLLM finds the renderer, and a tokenizer that goes with it


def register_all() -> None:
    """Register everything with transformers and vLLM; registering again replaces what is there."""
    check_vllm_version()

    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from dllm_plugin.engine_config import DiffusionEngineConfig
    from dllm_plugin.families import FAMILIES
    from dllm_plugin.models.dream_tokenizer import register_dream_tokenizer

    register_dream_tokenizer()
    if TOKENIZER_MODE not in RENDERER_REGISTRY.renderers:
        TokenizerRegistry.register(TOKENIZER_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
        RENDERER_REGISTRY.register(TOKENIZER_MODE, "dllm_plugin.renderer", "DiffusionRenderer")
    for family in FAMILIES:
        AutoConfig.register(family.config_class.model_type, family.config_class, exist_ok=True)
        for architecture in family.architectures:
            # a string: vLLM imports the class only in the process that runs the model
            if architecture not in ModelRegistry.get_supported_archs():
                ModelRegistry.register_model(architecture, family.adapter)
            MODELS_CONFIG_MAP[architecture] = DiffusionEngineConfig

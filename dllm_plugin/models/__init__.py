"""One adapter a family over vLLM's layers. Nobody imports the adapters but vLLM, through these strings."""

ARCHITECTURES: dict[str, str] = {
    "LLaDAModelLM": "dllm_plugin.models.llada:LLaDAForDiffusionLM",
    "LLaDAForDiffusionLM": "dllm_plugin.models.llada:LLaDAForDiffusionLM",
    "DreamModel": "dllm_plugin.models.dream:DreamForDiffusionLM",
    "DreamForDiffusionLM": "dllm_plugin.models.dream:DreamForDiffusionLM",
}

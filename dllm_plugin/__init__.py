"""Serve diffusion language models with stock vLLM.

vLLM imports this module in every process through the ``vllm.general_plugins`` entry point. An import error would only
be logged there, so nothing but the standard library is imported here; an error raised by ``register`` stops start-up.
"""

__version__ = "0.1.0"


def register() -> None:
    """Register model families, configs and the engine-config hook with vLLM. Safe to call more than once.

    Raises RuntimeError when the installed vLLM is outside the supported range.
    """
    from dllm_plugin.plugin import register_all

    register_all()

"""The worker: the canvas (per-request device state), the model runner, and vLLM's worker around them."""

from dllm_plugin.worker.worker import DiffusionWorker

__all__ = ["DiffusionWorker"]

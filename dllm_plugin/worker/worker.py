"""vLLM's worker with our model runner: CPU and CUDA by the same code."""

import os
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import Worker as GPUWorker
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment
from vllm.v1.worker.worker_base import CompilationTimes

from dllm_plugin.settings import settings_of
from dllm_plugin.worker.model_runner import DiffusionModelRunner

if TYPE_CHECKING or not current_platform.is_cpu():
    _PlatformWorker = GPUWorker
else:  # a GPUWorker too
    from vllm.v1.worker.cpu_worker import CPUWorker as _PlatformWorker


class DiffusionWorker(_PlatformWorker):
    """Holds one rank's share of a diffusion language model.

    Raises ValueError when the model is not one: its scheduler would be vLLM's, and its requests left to right.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        settings_of(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        # our runner is neither of vLLM's two; this keeps the branches of the second one off
        self.use_v2_model_runner = False

    def init_device(self) -> None:
        if not current_platform.is_cpu():
            super().init_device()
            return
        # CPUWorker.init_device of vLLM 0.32 without the model runner it builds and the process-wide change of
        # torch.set_num_threads
        self.device = torch.device("cpu")
        method = self.distributed_init_method
        os.environ["VLLM_DIST_IDENT"] = (
            os.path.basename(method.removeprefix("file://"))
            if method.startswith("file://")
            else method.rpartition(":")[2]
        )
        init_worker_distributed_environment(
            self.vllm_config, self.rank, method, self.local_rank, current_platform.dist_backend
        )
        set_random_seed(self.model_config.seed)
        self.model_runner = self._make_model_runner()  # type: ignore[assignment]  # as below

    # neither of vLLM's two runners, which its workers name
    def _make_model_runner(self) -> DiffusionModelRunner:  # type: ignore[override]
        assert self.device is not None  # `init_device` comes first
        return DiffusionModelRunner(self.vllm_config, self.device)

    def _should_warm_up_model(self) -> bool:
        return False  # nothing is compiled

    def compile_or_warm_up_model(self) -> CompilationTimes:
        set_random_seed(self.model_config.seed)
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def execute_dummy_batch(self) -> None:
        """Engines of data parallelism do not step together, so that nothing is to be done for another one."""

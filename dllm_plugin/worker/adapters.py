"""LoRA adapters of a batch of windows, by vLLM's own LoRA layers and manager."""

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from vllm.config import LoRAConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from dllm_plugin.scheduler.output import NewCanvas
from dllm_plugin.settings import settings_of
from dllm_plugin.worker.batch import Layout, StepBatch
from dllm_plugin.worker.canvas import CanvasStore

# vLLM 0.32's LoRA kernels for CPU look a token without adapter up under index -1, which is the last adapter
# (lora/ops/torch_ops/lora_ops.py). There such tokens get an adapter of zeros, in a slot of its own.
NO_ADAPTER = LoRARequest("dllm_plugin_no_adapter", 2**31 - 1, "/no/adapter")


class AdapterMixin(LoRAModelRunnerMixin):
    """What a model runner needs to serve several adapters, and none, in one batch."""

    state: CanvasStore
    lora_config: LoRAConfig | None
    active: tuple[Layout, int] | None = None  # what was told last

    def load_lora_model(self, model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> nn.Module:
        config, lora = copy.copy(vllm_config), vllm_config.lora_config
        # guidance forwards a second copy of a window, which vLLM's buffers for tokens and sequences must hold too
        config.scheduler_config = scheduler = copy.copy(vllm_config.scheduler_config)
        scheduler.max_num_seqs *= 2
        scheduler.max_num_batched_tokens = settings_of(vllm_config).most_tokens
        if not current_platform.is_cpu():
            return super().load_lora_model(model, config, device)
        assert lora is not None and lora.max_cpu_loras is not None  # vLLM has made it max_loras where it was not given
        config.lora_config = replace(lora, max_loras=lora.max_loras + 1, max_cpu_loras=lora.max_cpu_loras + 1)
        model = super().load_lora_model(model, config, device)
        self.add_no_adapter()
        return model

    def add_no_adapter(self) -> None:
        assert self.lora_config is not None
        self.lora_manager.add_dummy_lora(NO_ADAPTER, rank=min(8, self.lora_config.max_lora_rank))
        self.lora_manager.pin_adapter(NO_ADAPTER.lora_int_id)

    def reset_lora_state(self) -> None:
        super().reset_lora_state()
        self.active = None
        if self.lora_config and current_platform.is_cpu():
            self.add_no_adapter()  # all are dropped

    def activate_adapters(self, batch: StepBatch) -> None:
        """Tell vLLM's LoRA layers which adapter each token, and each row of logits, belongs to."""
        key = batch.layout, len(batch.row_request)
        if batch.segments.skip_unmasked and key == self.active:
            return  # all places of a layout have their rows
        canvases = [self.state.requests[request_id].canvas for request_id in batch.request_ids]
        token_request = np.repeat(batch.layout.window_request, batch.layout.window_length)
        self.tell_adapters(canvases, token_request, batch.row_request.numpy(force=True))
        self.active = key

    def tell_adapters(self, canvases: list[NewCanvas], token_request: np.ndarray, row_request: np.ndarray) -> None:
        """The same by the index of its canvas, of each token and each row."""
        self.active = None
        adapters = [canvas.lora_request for canvas in canvases]
        if current_platform.is_cpu() and any(adapters):
            adapters = [adapter or NO_ADAPTER for adapter in adapters]
        ids = np.array([adapter.lora_int_id if adapter else 0 for adapter in adapters])
        of_row, of_token = ids[row_request].tolist(), ids[token_request].tolist()
        self._set_active_loras(tuple(of_row), tuple(of_token), {a for a in adapters if a})

    def list_loras(self) -> set[int]:
        return super().list_loras() - {NO_ADAPTER.lora_int_id} if self.lora_config else set()

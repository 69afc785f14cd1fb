"""Weights and logits that are no numbers: told in the log, and never served as tokens."""

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger

logger = init_logger("vllm." + __name__)


def weights_are_finite(model: nn.Module) -> bool:
    """Whether those of all ranks are, by one pass over each tensor. The log names the first that is not."""
    tensors = [*model.named_parameters()]
    wrong = [name for name, tensor in tensors if not is_finite(tensor)]
    if wrong:
        logger.error(
            "The weights hold NaN or infinity, first in %s, in %d of %d tensors. Requests that they reach end with an error; "
            "take the checkpoint anew",
            wrong[0],
            len(wrong),
            len(tensors),
        )
    number = torch.tensor([float(len(wrong))], device=tensors[0][1].device)
    return tensor_model_parallel_all_reduce(number).item() == 0


@torch.inference_mode()
def is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    lowest, highest = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return bool(lowest.isfinite() & highest.isfinite())


def in_place_of_no_choice(token: Tensor, logits: Tensor, mask_token_id: int) -> Tensor:
    """``token`` ``[rows]`` with the mask in rows whose logits are no numbers: it is never chosen, so the host knows of it."""
    return torch.where(logits.sum(1, dtype=torch.float32).isfinite(), token, mask_token_id)

"""Weights and logits that are no numbers."""

import torch
from torch import Tensor


@torch.inference_mode()
def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor infinity; an empty one does not."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    lowest, highest = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return bool(lowest.isfinite() & highest.isfinite())


def in_place_of_no_choice(token: Tensor, logits: Tensor, mask_token_id: int) -> Tensor:
    """``token`` ``[rows]`` with the mask in rows whose logits are no numbers: it is never chosen, so the host knows of it."""
    return torch.where(logits.sum(1, dtype=torch.float32).isfinite(), token, mask_token_id)

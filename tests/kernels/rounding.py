"""What a product is whose first factor is rounded before it."""

import torch


def check_product(out, factor, other):
    """`out` is `factor`, which float64 gives, rounded to the dtype of `out`, times `other`, rounded again."""
    if out.dtype == torch.float32:
        torch.testing.assert_close(out.double(), factor * other.double(), rtol=2e-6, atol=1e-30)
        return
    # Bit for bit, except where a float32 may fall on either side of a midpoint.
    low, high = (factor * (1 - 1e-6)).to(out.dtype), (factor * (1 + 1e-6)).to(out.dtype)
    settled = low == high
    assert settled.double().mean() > 0.95 or settled.numel() < 50
    assert torch.equal(out[settled], (low * other)[settled])

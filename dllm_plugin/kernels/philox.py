"""Counter-based random numbers: Philox 4x32-10, the same bits in torch and in Triton.

A number is a function of (seed, position, timestep, index, stream) and of nothing else, so a request draws the same noise
alone, in any batch and on any shard. The key is the seed (low word, high word); the counter is (index // 4, position,
timestep, stream); the number is word `index % 4` of the block, so that the columns of a row cost a quarter of a block each.
Only the low 32 bits of position and timestep count.

Streams: TOKEN for the choice of a token (index = vocabulary id), ORDER for the order of positions, UNIFORM for random
confidences, MASK for what is masked of given text. Bits agree exactly; Gumbel noise agrees to a few fp32 roundings, since each
device has its own logarithm.
"""

import torch
from torch import Tensor

from dllm_plugin.kernels.dispatch import tl, triton

TOKEN, ORDER, UNIFORM, MASK = 0, 1, 2, 3

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def signed_64_bits(seed: int) -> int:
    """Any integer seed as the int64 with the same low 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox 4x32-10 of `counter` [4, ...] under `key` [2, ...] of the same rank: [4, ...] int64 words in [0, 2**32)."""
    constants = torch.tensor((_MULTIPLIERS, _WEYL), device=counter.device).view(2, 2, *(1,) * (counter.dim() - 1))
    multiplier, weyl = constants.unbind()
    even, odd = counter[0::2], counter[1::2]
    for _ in range(10):
        # The 64-bit product wraps in int64, but its bits are right: the mask drops what the signed shift smears.
        product = (even * multiplier).flip(0)
        even = (product >> 32).bitwise_and_(_MASK) ^ odd ^ key
        odd = product.bitwise_and_(_MASK)
        key = (key + weyl) & _MASK
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def row_bits(
    seed: Tensor, position: Tensor, timestep: Tensor, stream: int, num_columns: int, first_column: int = 0
) -> Tensor:
    """32 random bits as int64 of columns `[first_column, first_column + num_columns)` of each row: [rows, num_columns]."""
    first_block, last_block = first_column // 4, -(-(first_column + num_columns) // 4)
    block = torch.arange(first_block, last_block, device=seed.device)
    rows = seed.shape[0]
    shape = (rows, last_block - first_block)
    counter = _counter(block.expand(shape), position[:, None].expand(shape), timestep[:, None].expand(shape), stream)
    words = philox4x32(counter, _key(seed[:, None])).permute(1, 2, 0).flatten(1)
    return words[:, first_column - 4 * first_block :][:, :num_columns]


def uniform(
    seed: Tensor, position: Tensor, timestep: Tensor, *, stream: int = TOKEN, num_columns: int | None = None
) -> Tensor:
    """fp32 uniforms in the open interval (0, 1): [rows], or [rows, num_columns] when that is given."""
    bits = row_bits(seed, position, timestep, stream, 1 if num_columns is None else num_columns)
    return uniform_from_bits(bits.squeeze(1) if num_columns is None else bits)


def gumbel(
    seed: Tensor, position: Tensor, timestep: Tensor, *, stream: int = TOKEN, num_columns: int | None = None
) -> Tensor:
    """fp32 standard Gumbel noise: [rows], or [rows, num_columns] when that is given."""
    bits = row_bits(seed, position, timestep, stream, 1 if num_columns is None else num_columns)
    return gumbel_from_bits(bits.squeeze(1) if num_columns is None else bits)


def uniform_from_bits(bits: Tensor) -> Tensor:
    """Odd multiples of 2**-24: the widest set of fp32 numbers that is symmetric and holds neither 0 nor 1."""
    return ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23


def gumbel_from_bits(bits: Tensor) -> Tensor:
    """-log(e) of an exponential variate e.

    A large Gumbel value is a small e, so e is made from a uniform v that is small there: fp32 keeps its relative
    precision down to 2**-33, and the upper tail, which decides the argmax over 100,000 columns, is exact. The usual
    -log(-log(u)) takes it from u near 1, where fp32 has steps of 2**-24 and the tail stops at 16.6.
    """
    v = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


def _counter(block: Tensor, position: Tensor, timestep: Tensor, stream: int) -> Tensor:
    return torch.stack((block, position, timestep, torch.full_like(block, stream))).bitwise_and_(_MASK)


def _key(seed: Tensor) -> Tensor:
    return torch.stack((seed, seed >> 32)).bitwise_and_(_MASK)


@triton.jit
def philox_block(seed, position, timestep, block, stream: tl.constexpr):
    """The four words of counter (block, position, timestep, stream) as uint32; `block` may be a tensor."""
    block = block.to(tl.uint32)
    zero = block * 0
    return tl.philox(seed, block, zero + position.to(tl.uint32), zero + timestep.to(tl.uint32), zero + stream)


@triton.jit
def row_bits_block(seed, position, timestep, first_block, stream: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """Twin of `row_bits` for columns `[4 * first_block, 4 * (first_block + NUM_BLOCKS))`, in order."""
    w0, w1, w2, w3 = philox_block(seed, position, timestep, first_block + tl.arange(0, NUM_BLOCKS), stream)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def gumbel_from_bits_block(bits):
    """Twin of `gumbel_from_bits`."""
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994039535522)
    # The hardware logarithm is absolute to 2**-22 near 1, which would ruin the tail; there log1p is its series.
    series = 0.14285714285714285 + v * 0.125
    series = 0.16666666666666666 + v * series
    series = 0.2 + v * series
    series = 0.25 + v * series
    series = 0.3333333333333333 + v * series
    series = 0.5 + v * series
    series = v * (1.0 + v * series)
    return -tl.log(tl.where(v < 0.125, series, -tl.log(1.0 - v)))

"""Philox against its known answers, torch against Triton, and the numbers made from the bits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dllm_plugin.kernels import philox
from dllm_plugin.kernels.dispatch import tl, triton

# Random123, kat_vectors, philox 4x32 10: counter, key, answer
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
INT64 = st.integers(-(2**63), 2**63 - 1)


def words(text):
    return torch.tensor([int(word, 16) for word in text.split()])


@triton.jit
def bits_kernel(out_ptr, noise_ptr, key_ptr, first_block, STREAM: tl.constexpr, BLOCKS: tl.constexpr):
    bits = philox.row_bits_block(
        tl.load(key_ptr), tl.load(key_ptr + 1), tl.load(key_ptr + 2), first_block, STREAM, BLOCKS
    )
    offset = tl.arange(0, 4 * BLOCKS)
    tl.store(out_ptr + offset, bits.to(tl.int64))
    tl.store(noise_ptr + offset, philox.gumbel_from_bits_block(bits))


def triton_row(seed, position, timestep, first_block, stream, blocks):
    out = torch.zeros(4 * blocks, dtype=torch.int64)
    noise = torch.zeros(4 * blocks)
    bits_kernel[(1,)](out, noise, torch.tensor([seed, position, timestep]), first_block, stream, blocks)
    return out.cpu(), noise.cpu()


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert torch.equal(philox.philox4x32(words(counter), words(key)), words(answer))


def test_known_answer_reaches_the_row_of_zeros():
    zero = torch.zeros(1, dtype=torch.int64)
    assert torch.equal(philox.row_bits(zero, zero, zero, 0, 4)[0], words(KNOWN[0][2]))


@given(seed=INT64, position=st.integers(0, 2**31), timestep=st.integers(0, 2**31), block=st.integers(0, 2**20))
def test_triton_draws_the_same_bits(seed, position, timestep, block):
    bits, noise = triton_row(seed, position, timestep, block, philox.ORDER, 8)
    row = [torch.tensor([value]) for value in (seed, position, timestep)]
    expected = philox.row_bits(*row, philox.ORDER, 32, 4 * block)[0]
    assert torch.equal(bits, expected)
    torch.testing.assert_close(noise, philox.gumbel_from_bits(expected), rtol=2e-6, atol=2e-6)


def test_columns_do_not_depend_on_where_a_row_starts():
    seed = torch.tensor([3, -5])
    whole = philox.row_bits(seed, seed, seed, 0, 50)
    for first, count in ((0, 1), (1, 7), (6, 44), (49, 1)):
        assert torch.equal(philox.row_bits(seed, seed, seed, 0, count, first), whole[:, first : first + count])
    for column in range(50):
        counter = torch.tensor([[column // 4, 3, 3, 0], [column // 4, 2**32 - 5, 2**32 - 5, 0]]).T
        key = torch.tensor([[3, 0], [2**32 - 5, 2**32 - 1]]).T
        assert torch.equal(philox.philox4x32(counter, key)[column % 4], whole[:, column])


def test_every_field_matters():
    base = torch.tensor([9])
    drawn = {int(philox.row_bits(base, base, base, stream, 1)) for stream in range(3)}
    drawn |= {
        int(philox.row_bits(*((base + 2**k if f == g else base) for g in range(3)), 0, 1))
        for f in range(3)
        for k in (0, 31)
    }
    drawn.add(int(philox.row_bits(base + 2**32, base, base, 0, 1)))
    assert len(drawn) == 3 + 6 + 1


def test_uniform_is_open_at_both_ends():
    ends = philox.uniform_from_bits(torch.tensor([0, 2**32 - 1]))
    assert 0 < ends[0] < 1e-7 and 1 - 1e-7 < ends[1] < 1


def test_gumbel_keeps_its_upper_tail():
    bits = torch.tensor([0, 1, 1000, 2**31, 2**32 - 1])
    exact = [-math.log(-math.log1p(-((bit + 0.5) * 2.0**-32))) for bit in bits.tolist()]
    noise = philox.gumbel_from_bits(bits)
    torch.testing.assert_close(noise[:4].double(), torch.tensor(exact[:4]).double(), rtol=1e-6, atol=1e-6)
    assert noise.isfinite().all() and noise[4] < -2.8


def test_triton_gumbel_matches_over_the_whole_range():
    bits = torch.cat((torch.arange(0, 64), 2 ** torch.arange(6, 32), 2**32 - 1 - 2 ** torch.arange(0, 32)))
    bits = torch.nn.functional.pad(bits, (0, 128 - bits.shape[0]))
    out = torch.zeros(128)
    gumbel_kernel[(1,)](bits, out, 128)
    torch.testing.assert_close(out.cpu(), philox.gumbel_from_bits(bits), rtol=2e-6, atol=2e-6)


@triton.jit
def gumbel_kernel(bits_ptr, out_ptr, COUNT: tl.constexpr):
    offset = tl.arange(0, COUNT)
    bits = tl.load(bits_ptr + offset).to(tl.uint32)
    tl.store(out_ptr + offset, philox.gumbel_from_bits_block(bits))


@pytest.mark.parametrize(("draw", "law"), [(philox.uniform, stats.uniform), (philox.gumbel, stats.gumbel_r)])
def test_distribution(draw, law):
    seed = torch.arange(4)
    sample = draw(seed, seed, seed, num_columns=5000)
    assert sample.shape == (4, 5000) and draw(seed, seed, seed).shape == (4,)
    assert stats.kstest(sample.flatten().numpy(), law.cdf).pvalue > 0.01

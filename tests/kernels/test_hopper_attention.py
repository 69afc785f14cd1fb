"""What the Hopper kernel takes and how it describes it; the kernel itself needs the GPU (benchmarks/kernels.py --check)."""

import pytest
import torch

from dllm_plugin.kernels import hopper_attention
from dllm_plugin.kernels.store_kv import split_kv_cache

PAGES, PAGE, HEADS, SIZE = 3, 48, 4, 64


def numbers(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape).half()


def heads_inside_tokens():
    return split_kv_cache(numbers(PAGES, PAGE, HEADS, 2 * SIZE).transpose(1, 2), SIZE)


def tokens_inside_heads():
    return split_kv_cache(numbers(PAGES, HEADS, PAGE, 2 * SIZE), SIZE)


def one_head():
    return split_kv_cache(numbers(PAGES, 1, PAGE, 2 * SIZE), SIZE)


def one_page():
    return split_kv_cache(numbers(1, HEADS, PAGE, 2 * SIZE), SIZE)


def slices_of_a_projection():
    return numbers(70, 3 * HEADS, SIZE).split(HEADS, 1)[1:]


def rotated_beside_a_slice():
    return numbers(70, 2 * HEADS, SIZE)[:, HEADS:], numbers(70, 3 * HEADS, SIZE)[:, 2 * HEADS :]


LAYOUTS = [heads_inside_tokens, tokens_inside_heads, one_head, one_page, slices_of_a_projection, rotated_beside_a_slice]


def fits(key, value, query_heads=HEADS, rows=65, generation=9):
    query = torch.zeros(5, query_heads, key.shape[-1], dtype=key.dtype)
    return hopper_attention.fits(query, key, value, rows, generation)


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setattr(hopper_attention, "INTERPRETED", False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__.replace("_", " "))
def test_the_matrix_holds_every_key_where_the_kernel_looks(layout):
    key, value = layout()
    assert fits(key, value, query_heads=key.shape[-2])
    for tensor in (key, value):
        rows, columns, page_rows, head_rows, head_columns = hopper_attention._as_matrix(tensor)
        # past its own storage it may not reach
        assert (
            tensor.storage_offset() + (rows - 1) * tensor.stride(-3) + columns <= tensor.untyped_storage().nbytes() // 2
        )
        matrix = tensor.as_strided((rows, columns), (tensor.stride(-3), 1))
        paged = tensor if tensor.dim() == 4 else tensor[None]
        for page in range(paged.shape[0]):
            for head in range(paged.shape[2]):
                first, column = page * page_rows + head * head_rows, head * head_columns
                found = matrix[first : first + paged.shape[1], column : column + SIZE]
                assert torch.equal(found, paged[page, :, head])


def test_what_it_leaves_to_the_other_kernel():
    key, value = slices_of_a_projection()
    assert fits(key, value)
    assert not fits(key, value, rows=64) and not fits(key, value, generation=8) and not fits(key, value, generation=10)
    assert not fits(key.float(), value.float())
    assert not fits(key[..., :32], value[..., :32])
    odd = numbers(70, HEADS * SIZE + 4)[:, : HEADS * SIZE].unflatten(1, (HEADS, SIZE))  # rows of no whole 16 bytes
    assert not fits(odd, odd)
    shifted = numbers(70 * HEADS * SIZE + 4)[4:].view(70, HEADS, SIZE)  # no 16-byte address
    assert not fits(shifted, shifted)
    uneven = numbers(PAGES, PAGE * HEADS * SIZE + 8)[:, :-8].unflatten(1, (PAGE, HEADS, SIZE))
    assert not fits(uneven, uneven)
    assert not fits(heads_inside_tokens()[0], tokens_inside_heads()[1])


def test_interpreted_kernels_do_without_it(monkeypatch):
    monkeypatch.setattr(hopper_attention, "INTERPRETED", True)
    assert not fits(*slices_of_a_projection())

"""The adapters of the block-diffusion families: logits against plain models under full and block-causal attention."""

import functools
from collections.abc import Sequence

import pytest
import torch
from reference import block_checkpoints, block_models
from support.cases import random_prompt
from support.checkpoints import temporary_folder
from support.engines import model_runner, new_engine

from dllm_plugin.attention import WindowBatch
from dllm_plugin.kernels.window_attention import PagedWindows, Windows

# name: (writer, its options)
CHECKPOINTS: dict[str, tuple[str, dict]] = {
    "sdar": ("sdar", {}),
    "sdar-tied": ("sdar", {"tie_word_embeddings": True, "num_key_value_heads": 1, "vocab_size": 327}),
    "sdar-wide-heads": ("sdar", {"head_dim": 64, "shards": 2}),
}


@functools.cache
def folder(checkpoint):
    writer, options = CHECKPOINTS[checkpoint]
    return block_checkpoints.WRITERS[writer](temporary_folder(f"block-{checkpoint}"), seed=3, **options)


@functools.cache
def engine(checkpoint):
    return new_engine(folder(checkpoint))


@functools.cache
def reference(checkpoint):
    return block_models.load(folder(checkpoint))


def int32(values):
    return torch.tensor(list(values), dtype=torch.int32)


@torch.inference_mode()
def forward(llm, windows: Sequence[tuple[list[int], int]], block: int | None = None):
    """Logits of each window's tokens, a window being its sequence and where it begins, all in one batch.

    Under full attention without a block length, otherwise block-causal, over the engine's pages: the keys of positions
    before a window are those that an earlier call of the same order has left there.
    """
    runner = model_runner(llm)
    lengths = [len(ids) - start for ids, start in windows]
    ids = torch.tensor([token for ids, start in windows for token in ids[start:]])
    positions = torch.cat([torch.arange(start, len(ids)) for ids, start in windows])
    bounds = int32([0, *torch.tensor(lengths).cumsum(0).tolist()])
    ragged = {"query_start_loc": bounds, "max_query_len": max(lengths)}
    if block is None:
        assert not any(start for _, start in windows)
        batch = WindowBatch(len(ids), Windows(**ragged))
    else:
        size, most = runner.batches.page_size, max(len(ids) for ids, _ in windows)
        table = int32(range(len(windows) * -(-most // size))).view(len(windows), -1).flip(1)
        slots = [int(row[i // size]) * size + i % size for row, (ids, start) in zip(table, windows, strict=True)
                 for i in range(start, len(ids))]  # fmt: skip
        paged = PagedWindows(
            **ragged,
            window_start=int32(start for _, start in windows),
            visible=int32(len(ids) for ids, _ in windows),
            prefix_len=int32(0 for _ in windows),
            block_length=int32(block for _ in windows),
            block_table=table,
            max_visible=table.shape[1] * size,
        )
        batch = WindowBatch(0, None, paged, slot_mapping=torch.tensor(slots))
    with runner.attending(batch):
        hidden = runner.model(ids, positions)
    return runner.model.compute_logits(hidden).split(lengths)


def sequences(checkpoint, *lengths):
    """Prompts of these lengths, each with a tail of masks."""
    plain = reference(checkpoint)
    masks = [plain.mask_token_id] * 7
    return [[t % 310 for t in random_prompt(n, f"block-{n}")] + masks for n in lengths]


@pytest.mark.parametrize("num_requests", [1, 3])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_logits_under_full_attention(checkpoint, num_requests):
    plain, all_ids = reference(checkpoint), sequences(checkpoint, 9, 1, 30)[:num_requests]
    for ids, logits in zip(all_ids, forward(engine(checkpoint), [(ids, 0) for ids in all_ids]), strict=True):
        expected = plain.logits(torch.tensor(ids), torch.ones(len(ids), len(ids), dtype=torch.bool))
        assert logits.shape == expected.shape == (len(ids), plain.vocab_size)
        assert (logits - expected).abs().max() <= 1e-4


BLOCKS = [pytest.param(name, block, id=f"{name}-{block}") for name in CHECKPOINTS for block in (4, 8)]


@pytest.mark.parametrize(("checkpoint", "block"), BLOCKS)
def test_logits_under_block_causal_attention(checkpoint, block):
    """In blocks counted from the beginning; whole sequences, then windows over the keys that these have left."""
    plain, all_ids = reference(checkpoint), sequences(checkpoint, 9, 1, 30)
    expected = [plain.logits(torch.tensor(ids), block_models.block_causal(len(ids), block)) for ids in all_ids]
    starts = [0, 0, 0], [block, 0, 4 * block]
    for of_step in starts:
        windows = list(zip(all_ids, of_step, strict=True))
        for logits, want, start in zip(forward(engine(checkpoint), windows, block), expected, of_step, strict=True):
            assert (logits - want[start:]).abs().max() <= 1e-4


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_reference_reads_every_tensor(checkpoint):
    """And so does the engine, which refuses one that it has no place for."""
    plain = reference(checkpoint)
    plain.logits(torch.tensor([1, 2, 3]), torch.ones(3, 3, dtype=torch.bool))
    assert plain.used == set(plain.weights)

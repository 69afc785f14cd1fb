"""Times a denoising step of an 8B LLaDA with random weights, whole in one CUDA graph: python benchmarks/denoising_step.py

Plain torch linear layers around the kernels of dllm_plugin: a block of 32 masked tokens a request attends to 1,024 cached
tokens and itself, writes its keys and values into the pages, and its logits go through `confidence` and `unmask`, all
inside the graph. The floor is the time to read the weights once at the bandwidth of a large copy. Needs CUDA. The last line is
one JSON object; `--json FILE` writes it too.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import ceilings, environment, graph_time, int32
from torch import Tensor

from dllm_plugin.kernels.confidence import Choice, confidence
from dllm_plugin.kernels.store_kv import split_kv_cache, store_kv
from dllm_plugin.kernels.unmask import Segments, unmask
from dllm_plugin.kernels.window_attention import PagedWindows, window_attention

LAYERS, WIDTH, HEADS, HEAD_SIZE, INNER, VOCAB = 32, 4096, 32, 128, 12_288, 126_464
MASK_ID = 126_336
BLOCK, CACHED, PAGE = 32, 1024, 16


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(0.02)


@torch.compile(dynamic=False)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x.dtype)


@torch.compile(dynamic=False)
def gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


@torch.compile(dynamic=False)
def normalise(x: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), scale, 1e-5)


class Model:
    def __init__(self) -> None:
        self.embedding, self.head = weight(VOCAB, WIDTH), weight(VOCAB, WIDTH)
        self.layers = [
            {
                "qkv": weight(3 * WIDTH, WIDTH),
                "out": weight(WIDTH, WIDTH),
                "gate_up": weight(2 * INNER, WIDTH),
                "down": weight(WIDTH, INNER),
                "norms": torch.ones(2, WIDTH, device="cuda", dtype=torch.bfloat16),
            }
            for _ in range(LAYERS)
        ]
        self.norm = torch.ones(WIDTH, device="cuda", dtype=torch.bfloat16)

    def nbytes_read(self) -> int:
        """All weights but the embedding, of which a step gathers a few rows."""
        return self.head.nbytes + sum(tensor.nbytes for layer in self.layers for tensor in layer.values())


class Step:
    """One denoising step of `batch` requests; calling it is what the graph captures."""

    def __init__(self, model: Model, batch: int) -> None:
        self.model = model
        tokens, pages = batch * BLOCK, -(-(CACHED + BLOCK) // PAGE)
        self.caches = [
            split_kv_cache(weight(batch * pages, PAGE, HEADS, 2 * HEAD_SIZE).transpose(1, 2), HEAD_SIZE)
            for _ in range(LAYERS)
        ]
        self.block_table = torch.randperm(batch * pages, device="cuda").view(batch, pages).to(torch.int32)
        position = torch.arange(CACHED, CACHED + BLOCK, device="cuda")
        self.slots = (self.block_table[:, position // PAGE] * PAGE + position % PAGE).flatten().to(torch.int64)
        angle = position.repeat(batch)[:, None] / 500_000 ** (torch.arange(0, HEAD_SIZE, 2, device="cuda") / HEAD_SIZE)
        self.cos, self.sin = angle.cos()[:, None], angle.sin()[:, None]
        self.windows = PagedWindows(
            query_start_loc=int32(list(range(0, tokens + 1, BLOCK)), "cuda"),
            window_start=int32([CACHED] * batch, "cuda"),
            visible=int32([CACHED + BLOCK] * batch, "cuda"),
            prefix_len=int32([0] * batch, "cuda"),
            block_length=int32([0] * batch, "cuda"),
            block_table=self.block_table,
            max_query_len=BLOCK,
            max_visible=CACHED + BLOCK,
        )
        self.canvas_tokens = torch.full((batch, BLOCK), MASK_ID, dtype=torch.int32, device="cuda")
        self.canvas_masked = torch.ones(batch, BLOCK, dtype=torch.bool, device="cuda")
        self.choice = Choice(no_choice=torch.full((tokens, 1), MASK_ID, device="cuda"))
        self.segments = Segments(
            slot=int32(list(range(batch)), "cuda"),
            segment_start_loc=self.windows.query_start_loc,
            row_cell=torch.arange(tokens, device="cuda"),
            quota=int32([1] * batch, "cuda"),
            threshold=torch.full((batch,), 0.9, device="cuda"),
        )

    def __call__(self) -> Tensor:
        self.canvas_masked.fill_(True)  # every replay has a whole block to choose from
        x = F.embedding(self.canvas_tokens.flatten(), self.model.embedding)
        for layer, cache in zip(self.model.layers, self.caches, strict=True):
            x = x + self.attention(normalise(x, layer["norms"][0]), layer, cache)
            x = x + F.linear(gate(F.linear(normalise(x, layer["norms"][1]), layer["gate_up"])), layer["down"])
        chosen = confidence(F.linear(normalise(x, self.model.norm), self.model.head), self.choice)
        canvas = self.canvas_tokens, self.canvas_masked
        return unmask(*canvas, self.segments, chosen.token, chosen.probability).summary

    def attention(self, x: Tensor, layer: dict[str, Tensor], cache: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = F.linear(x, layer["qkv"]).view(-1, 3 * HEADS, HEAD_SIZE).split(HEADS, 1)
        q, k = (rotate(part, self.cos, self.sin) for part in (q, k))
        store_kv(k, v, *cache, self.slots)
        return F.linear(window_attention(q, *cache, self.windows, HEAD_SIZE**-0.5).flatten(1), layer["out"])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "denoising_step.py needs a CUDA device; benchmarks/kernels.py measures the torch path on a CPU"
        )
    limits = ceilings()
    torch.cuda.empty_cache()
    model = Model()
    floor = model.nbytes_read() / limits["copy_bytes_per_s"]
    result = {"environment": environment(), "ceilings": limits, "floor_ms": 1e3 * floor, "steps": []}
    for batch in (1, 8, 32):
        step = Step(model, batch)
        remaining = step()[:batch]
        if not (int(remaining.min()) >= 0 and int(remaining.max()) < BLOCK):
            raise AssertionError(
                f"a step must unmask at least one position of every request, left {remaining.tolist()}"
            )
        seconds = graph_time([step], 30)
        result["steps"].append({"batch": batch, "ms": 1e3 * seconds, "of_floor": floor / seconds})
        print(f"batch {batch:2d}: {1e3 * seconds:.2f} ms a step, floor {1e3 * floor:.2f} ms, {floor / seconds:.1%}")
        del step
        torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""What a denoising step costs beyond the model: scheduler, batch building, choosing, unmasking, output.

Every engine step is timed as a whole and, inside it, the model's forward passes and logits; the difference is ours and
vLLM's, and divided by the number of forward passes. In process, greedy, one token a step, on a bundled checkpoint. Twice:
with outputs asked for at the end only, as `LLM.generate` and HTTP without streaming do, where several denoising steps share
an engine step; and streamed, where each has its own. Prints a table and, last, one JSON line.

    python benchmarks/overhead.py --steps 200
"""

import argparse
import json
import statistics
import time

import measure
import torch
from vllm import LLM, SamplingParams
from vllm import __version__ as vllm_version
from vllm.sampling_params import RequestOutputKind

from dllm_plugin.checkpoints import path


class ModelClock:
    """Adds up the time spent inside a model's forward pass and its logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seconds = 0.0
        self.num_passes = 0
        model.forward = self._counted(self._timed(model.forward))
        model.compute_logits = self._timed(model.compute_logits)

    def _counted(self, function):
        def counted(*args, **kwargs):
            self.num_passes += 1
            return function(*args, **kwargs)

        return counted

    def _timed(self, function):
        def timed(*args, **kwargs):
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - begin
            return result

        return timed


def measure_steps(
    llm: LLM, clock: ModelClock, num_requests: int, num_passes: int, prompt_length: int, canvas: int, kind
) -> dict:
    """Medians over the denoising steps in which all requests run; each request is replaced when it ends."""
    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=canvas, ignore_eos=True, output_kind=kind)
    added, step_ms, model_ms = 0, [], []
    while len(step_ms) < num_passes:
        while engine.get_num_unfinished_requests() < num_requests:
            prompt = {"prompt_token_ids": [10 + (added + i) % 80 for i in range(prompt_length)]}
            engine.add_request(f"overhead-{kind.name}-{num_requests}-{added}", prompt, params)
            added += 1
        clock.seconds, clock.num_passes = 0.0, 0
        begin = time.perf_counter()
        engine.step()
        seconds, passes = time.perf_counter() - begin, clock.num_passes
        step_ms += [seconds / passes * 1e3] * passes
        model_ms += [clock.seconds / passes * 1e3] * passes
    while engine.has_unfinished_requests():
        engine.step()
    overhead = [step - model for step, model in zip(step_ms, model_ms, strict=True)][num_passes // 10 :]
    return {
        "outputs": "streamed" if kind == RequestOutputKind.CUMULATIVE else "at the end",
        "requests": num_requests,
        "step_ms": round(statistics.median(step_ms), 3),
        "model_ms": round(statistics.median(model_ms), 3),
        "overhead_ms": round(statistics.median(overhead), 3),
        "overhead_p90_ms": round(statistics.quantiles(overhead, n=10)[-1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="tiny-llada", help="bundled checkpoint")
    parser.add_argument("--steps", type=int, default=300, help="denoising steps measured for each batch size")
    parser.add_argument("--prompt-length", type=int, default=32, help="tokens")
    parser.add_argument("--canvas", type=int, default=32, help="masked positions of a request")
    args = parser.parse_args()

    llm = LLM(
        model=str(path(args.checkpoint)),
        dtype="float32",
        max_num_seqs=16,
        kv_cache_memory_bytes=64 << 20,
        additional_config=measure.EXACT,
    )
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    clock = ModelClock(runner.model)
    final, streamed = RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE
    measure_steps(llm, clock, 16, 50, args.prompt_length, args.canvas, streamed)  # warm-up
    rows = [
        measure_steps(llm, clock, n, args.steps, args.prompt_length, args.canvas, kind)
        for kind in (final, streamed)
        for n in (1, 16)
    ]
    threads = torch.get_num_threads()
    print(f"{args.checkpoint}, float32, CPU with {threads} thread(s), torch {torch.__version__}, vLLM {vllm_version}")
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    names = ("overhead_ms", "overhead_16_ms", "streamed_overhead_ms", "streamed_overhead_16_ms")
    figures = {name: row["overhead_ms"] for name, row in zip(names, rows, strict=True)}
    print(json.dumps(figures | {"rows": rows}))


if __name__ == "__main__":
    main()

"""Answers under random grammars: how many are valid, and what they cost. python benchmarks/structured.py [--cases 500]

Each case is a random JSON schema or regular expression, every second one at temperature 1. All of a checkpoint are asked at
once, sixteen in a batch: first without a grammar, then with theirs, then each beside a request without one, so that both must
have the tokens that they had before. Prints for each checkpoint the share of valid answers, how many tokens changed, and the
tokens per forward pass with and without grammars, of canvases of 32 tokens. The last line is one JSON object. Answers are
bounded by their grammars, so that none is cut off.
"""

import argparse
import json
import random
import re

import measure  # before torch and vLLM: it sets the environment
from jsonschema import Draft202012Validator
from vllm import LLM, SamplingParams
from vllm import __version__ as vllm_version
from vllm.sampling_params import StructuredOutputsParams

from dllm_plugin import checkpoints
from dllm_plugin.checkpoints.tasks import questions
from dllm_plugin.metrics import num_forward_passes

MAX_TOKENS, CANVAS_LENGTH = 200, 32


def random_schema(draw: random.Random, depth: int = 2) -> dict:
    """A JSON schema whose answers have a greatest length."""
    kinds = ["integer", "string", "boolean", "enum", "null"] + (["object", "array"] if depth else [])
    kind = draw.choice(kinds) if depth < 2 else "object"
    if kind == "object":
        names = draw.sample(["a", "b", "name", "size", "red"], k=draw.randint(1, 3))
        properties = {name: random_schema(draw, depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    if kind == "array":
        least = draw.randint(0, 2)
        return {
            "type": "array",
            "items": random_schema(draw, 0),
            "minItems": least,
            "maxItems": least + draw.randint(0, 2),
        }
    return {
        "integer": {"type": "integer", "minimum": 0, "maximum": draw.choice([9, 99, 1000])},
        "string": {"type": "string", "maxLength": draw.randint(1, 5)},
        "boolean": {"type": "boolean"},
        "enum": {"enum": draw.sample(["red", "blue", "green", 1, 20], k=draw.randint(1, 3))},
        "null": {"type": "null"},
    }[kind]


def random_regex(draw: random.Random) -> str:
    """A regular expression whose matches have a greatest length."""
    parts = ["[a-c]", "x", r"\d", "(red|blue)", "[^ab]", "-", "(ab|c)"]
    return "".join(draw.choice(parts) + draw.choice(["", "?", "{2}", "{0,3}"]) for _ in range(draw.randint(1, 5))) + "z"


def random_constraint(draw: random.Random) -> StructuredOutputsParams:
    if draw.random() < 0.5:
        return StructuredOutputsParams(json=random_schema(draw))
    return StructuredOutputsParams(regex=random_regex(draw))


def is_valid(constraint: StructuredOutputsParams, text: str) -> bool:
    if constraint.regex is not None:
        return re.fullmatch(constraint.regex, text) is not None
    try:
        return Draft202012Validator(constraint.json).is_valid(json.loads(text))
    except json.JSONDecodeError:
        return False


def run(llm: LLM, cases: int, extras: dict[str, object], seed: int) -> dict[str, float]:
    """Shares and tokens per forward pass of so many cases on one engine."""
    draw = random.Random(seed)
    constraints = [random_constraint(draw) for _ in range(cases)]
    asked = [[{"role": "user", "content": question.text}] for question in questions("held_out", cases, seed=0)]

    def sampling(number: int, **more: object) -> SamplingParams:
        return SamplingParams(
            temperature=number % 2, seed=number, max_tokens=MAX_TOKENS, extra_args=dict(extras), **more
        )

    free = [sampling(number) for number in range(cases)]
    bound = [sampling(number, structured_outputs=constraint) for number, constraint in enumerate(constraints)]
    alone, bound_alone = (llm.chat(asked, each, use_tqdm=False) for each in (free, bound))
    mixed = llm.chat(
        [chat for chat in asked for _ in range(2)],
        [one for pair in zip(bound, free, strict=True) for one in pair],
        use_tqdm=False,
    )
    answers, neighbours = mixed[::2], mixed[1::2]
    valid = [is_valid(one, answer.outputs[0].text) for one, answer in zip(constraints, answers, strict=True)]
    for constraint, answer, right in zip(constraints, answers, valid, strict=True):
        if not right:
            print(
                "not valid:",
                constraint.json or constraint.regex,
                repr(answer.outputs[0].text),
                answer.outputs[0].finish_reason,
            )

    def num_changed(before: list, after: list) -> int:
        pairs = zip(before, after, strict=True)
        return sum(a.outputs[0].token_ids != b.outputs[0].token_ids for a, b in pairs)

    def per_forward(outputs: list) -> float:
        passes = sum(num_forward_passes(output.outputs[0]) for output in outputs)
        return sum(len(output.outputs[0].token_ids) for output in outputs) / passes

    return {
        "cases": cases,
        "valid": sum(valid) / cases,
        "changed_by_neighbours": num_changed(bound_alone, answers),
        "neighbours_changed": num_changed(alone, neighbours),
        "tokens_per_forward_grammar": per_forward(answers),
        "tokens_per_forward_free": per_forward(alone),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500, help="of each checkpoint (default: %(default)s)")
    parser.add_argument("--checkpoint", action="append", choices=checkpoints.NAMES, help="default: all")
    parser.add_argument("--backend", default="xgrammar", help="of vLLM's structured outputs (default: %(default)s)")
    arguments = parser.parse_args()
    result = {"environment": measure.environment() | {"vllm": vllm_version}}
    for name in arguments.checkpoint or checkpoints.NAMES:
        llm = LLM(
            model=str(checkpoints.path(name)), dtype="float32", max_num_seqs=16, kv_cache_memory_bytes=64 << 20,
            structured_outputs_config={"backend": arguments.backend, "disable_any_whitespace": True}, use_tqdm_on_load=False,
        )  # fmt: skip
        extras = {"diffusion_canvas_length": CANVAS_LENGTH} | checkpoints.DECODING.get(name, {})
        result[name] = run(llm, arguments.cases, extras, seed=1)
        print(name, result[name], flush=True)
        llm.llm_engine.engine_core.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main()

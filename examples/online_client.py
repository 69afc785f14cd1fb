"""The OpenAI client against a served diffusion model: completions and chat, streaming and not.

    vllm serve "$(dllm-plugin checkpoint tiny-llada)" --max-model-len 512 &
    python examples/online_client.py --prompt "Reverse the word cat."

Decoding parameters travel in ``vllm_xargs``: vLLM ignores a ``diffusion_*`` field outside of it without a word.
"""

import argparse
import json
from typing import Any

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1", help="(default: %(default)s)")
    parser.add_argument("--model", help="served model (default: the first one)")
    parser.add_argument("--prompt", default="Reverse the word cat.", help="(default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=32, help="longest answer (default: %(default)s)")
    parser.add_argument(
        "--diffusion",
        type=json.loads,
        default={},
        metavar="JSON",
        help="JSON object of diffusion_* parameters (default: %(default)s)",
    )
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key="none")
    settings = {
        "model": args.model or client.models.list().data[0].id,
        "max_tokens": args.max_tokens,
        "temperature": 0,
        "extra_body": {"vllm_xargs": args.diffusion},
    }
    chat(client, args.prompt, settings)
    chat_streaming(client, args.prompt, settings)
    complete(client, args.prompt, settings)
    complete_streaming(client, args.prompt, settings)


def chat(client: OpenAI, prompt: str, settings: dict[str, Any]) -> None:
    answer = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **settings)
    print("chat:", repr(answer.choices[0].message.content), answer.usage.completion_tokens, "tokens")


def chat_streaming(client: OpenAI, prompt: str, settings: dict[str, Any]) -> None:
    """A chunk holds what became final and has everything before it final too, so it may be several tokens."""
    stream = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], stream=True, **settings)
    print("chat, streaming:", [chunk.choices[0].delta.content for chunk in stream if chunk.choices])


def complete(client: OpenAI, prompt: str, settings: dict[str, Any]) -> None:
    answer = client.completions.create(prompt=prompt, **settings)
    print("completion:", repr(answer.choices[0].text), answer.choices[0].finish_reason)


def complete_streaming(client: OpenAI, prompt: str, settings: dict[str, Any]) -> None:
    stream = client.completions.create(prompt=prompt, stream=True, **settings)
    print("completion, streaming:", [chunk.choices[0].text for chunk in stream if chunk.choices])


if __name__ == "__main__":
    main()

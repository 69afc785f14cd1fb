"""Rollouts for reinforcement learning: sample, score, and see which tokens each forward pass unmasked; then change the weights.

    python examples/rollouts.py --model "$(dllm-plugin checkpoint tiny-sdar)"

What a trainer replays is `dllm_plugin.rollouts.Rollout`: the tokens up to the end of the last block, the pass that unmasked each,
and its log-probability there.
"""

import argparse

from vllm import LLM, SamplingParams

from dllm_plugin import checkpoints
from dllm_plugin.checkpoints.tasks import questions
from dllm_plugin.rollouts import Rollout, rollouts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(checkpoints.path("tiny-sdar")), help="(default: the bundled tiny-sdar)")
    parser.add_argument("--weights", help="folder of the weights of the next round (default: the model's own)")
    parser.add_argument("--samples", type=int, default=4, help="of each question (default: %(default)s)")
    args = parser.parse_args()

    llm = LLM(model=args.model, dtype="float32", use_tqdm_on_load=False)
    asked = questions("train", 3, seed=0)
    params = SamplingParams(
        n=args.samples,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        max_tokens=32,
        extra_args={"diffusion_trajectory": 1},
    )
    for number in range(2):
        outputs = llm.chat([[{"role": "user", "content": one.text}] for one in asked], params, use_tqdm=False)
        for question, output in zip(asked, outputs, strict=True):
            rewards = [float(completion.text == question.answer) for completion in output.outputs]
            print(f"round {number}: {question.text} {rewards}")
            show(rollouts(output)[0])
        # with the engine in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0) a trainer gives tensors: "weights_iterator"
        llm.collective_rpc("reload_weights", kwargs={"weights_path": args.weights or args.model})
        llm.reset_prefix_cache()  # else keys and values of the old weights answer for prompts that come again


def show(rollout: Rollout) -> None:
    told = f"{len(rollout.prompt_token_ids)} tokens of prompt, {rollout.num_answer} of answer"
    print(f"  {told}, their log-probabilities add up to {sum(rollout.logprobs):.3f}")
    print("  unmasked in pass", " ".join(f"{step}" if step >= 0 else "." for step in rollout.forward_passes))


if __name__ == "__main__":
    main()

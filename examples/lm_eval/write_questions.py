"""Writes held-out questions of the bundled checkpoints as JSONL, each with its answer and three wrong ones.

python examples/lm_eval/write_questions.py --output questions.jsonl --count 40
"""

import argparse
import json
import random
from pathlib import Path

from dllm_plugin.checkpoints.tasks import Question, questions


def choices_of(question: Question, pool: list[Question], draw: random.Random) -> dict[str, object]:
    """The line of a question: wrong choices are the answers of others of its task."""
    others = {other.answer for other in pool if other.task == question.task} - {question.answer}
    choices = [question.answer, *draw.sample(sorted(others), 3)]
    draw.shuffle(choices)
    return {
        "question": question.text,
        "answer": question.answer,
        "choices": choices,
        "gold": choices.index(question.answer),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40, help="questions (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, pool = random.Random(options.seed), questions("held_out", max(options.count, 100), options.seed)
    lines = [json.dumps(choices_of(question, pool, draw)) for question in pool[: options.count]]
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

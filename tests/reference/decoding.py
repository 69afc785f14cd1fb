"""What both reference decoders share: the canvas, the blocks, the tie rule, and going on past a full canvas.

Positions are counted from the start of the response, steps from the start of the request. The noise callbacks of the
decoders get both numbers, so a test can inject the numbers that an engine drew, or those of a seeded run of the
published code.

Deliberate deviations from the published code, common to both decoders:

- Equal confidences commit the lowest position first, equal logits choose the lowest token id, and softmax is in float32
  whatever the model's dtype. The published code leaves ties to `torch.topk`, which takes the lowest positions on a GPU
  and follows no rule on a CPU. Ties are no rarity: deferred EOS tokens all have confidence 0, and a top_p that keeps one
  token gives confidence 1 everywhere.
- The mask token is never chosen. It stays in the softmax and in every statistic of it, so wherever the published code
  does not choose the mask its confidences are these.
- Which positions are masked is kept in a boolean of its own: a prompt may hold the mask token as text.
- A block ends as soon as nothing is masked in it. The published code would go on running forward passes that cannot
  change anything. A pass that decides nothing is run here as there, and changes nothing: it is not counted.
- Canvas and steps need not divide: the last block is shorter, the first `steps % blocks` blocks get one step more.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor

# (step, positions [rows]) -> numbers in [0, 1), float32 [rows]
Uniforms = Callable[[int, Tensor], Tensor]
# (step, positions [rows], time in (0, 1] at which the step begins) -> numbers in [0, 1) [rows]
OriginUniforms = Callable[[int, Tensor, Tensor], Tensor]
# (step, positions [rows]) -> standard Gumbel noise, float64 [rows]
PositionGumbel = Callable[[int, Tensor], Tensor]
# (step, positions [rows]) -> standard Gumbel noise, float64 [rows, vocabulary]
TokenGumbel = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Commit:
    """What one forward pass decided."""

    positions: list[int]  # ascending
    tokens: list[int]


@dataclass(frozen=True)
class Generation:
    tokens: list[int]  # the whole canvas; the mask id where decoding stopped before a position was decided
    trace: list[Commit]  # one entry per forward pass that decided something
    num_steps: int = 0  # with those that decided nothing

    @property
    def num_forwards(self) -> int:
        return len(self.trace)


@dataclass(frozen=True)
class Block:
    start: int
    end: int
    steps: int


def blocks(gen_length: int, block_length: int | None, steps: int) -> list[Block]:
    """The blocks of a canvas with their shares of the steps.

    >>> blocks(10, 4, 8)
    [Block(start=0, end=4, steps=3), Block(start=4, end=8, steps=3), Block(start=8, end=10, steps=2)]
    """
    block_length = block_length or gen_length
    starts = range(0, gen_length, block_length)
    if steps < len(starts):
        raise ValueError(f"{steps} steps cannot serve {len(starts)} blocks; use at least one step a block")
    share, extra = divmod(steps, len(starts))
    return [
        Block(start, min(start + block_length, gen_length), share + (index < extra))
        for index, start in enumerate(starts)
    ]


@dataclass
class Canvas:
    """A prompt followed by masked positions, and the record of how they were filled."""

    prompt_ids: list[int]
    gen_length: int
    mask_token_id: int
    stop_ids: Collection[int] = ()
    trace: list[Commit] = field(default_factory=list)
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.ids = torch.tensor(self.prompt_ids + [self.mask_token_id] * self.gen_length)
        self.response = self.ids[len(self.prompt_ids) :]  # a view: writing to it writes to ids
        self.masked = torch.ones(self.gen_length, dtype=torch.bool)

    def passes(self, block: Block) -> Iterator[tuple[int, Tensor]]:
        """The forward passes of a block as (step in block, masked positions), until nothing is left to decide."""
        for step in range(block.steps):
            candidates = block.start + self.masked[block.start : block.end].nonzero()[:, 0]
            if len(candidates) == 0 or self.stopped:
                return
            yield step, candidates

    def commit(self, positions: Tensor, tokens: Tensor) -> None:
        order = positions.argsort()
        positions, tokens = positions[order], tokens[order]
        self.response[positions] = tokens
        self.masked[positions] = False
        self.num_steps += 1
        if len(positions):
            self.trace.append(Commit(positions.tolist(), tokens.tolist()))

    @property
    def stopped(self) -> bool:
        """True once a stop id stands with everything before it decided."""
        stops = sum(self.response == stop_id for stop_id in self.stop_ids) if self.stop_ids else torch.zeros(1)
        first_masked = int(self.masked.int().argmax()) if self.masked.any() else self.gen_length
        return bool(stops[:first_masked].any())

    def result(self) -> Generation:
        return Generation(self.response.tolist(), self.trace, self.num_steps)


def choose(logits: Tensor, mask_token_id: int) -> Tensor:
    """The highest logit of each row [rows, vocabulary], never the mask; ties take the lowest id."""
    allowed = logits.clone()
    allowed[:, mask_token_id] = -torch.inf
    return allowed.argmax(dim=-1)


def most_confident(confidence: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of confidence [rows], ties taking the lowest index."""
    return confidence.sort(descending=True, stable=True).indices[:count]


def truncate_at_eos(tokens: list[int], eos_id: int | Collection[int]) -> list[int]:
    """Tokens up to and including the first EOS: what a finished vLLM request carries in `token_ids`."""
    eos_ids = {eos_id} if isinstance(eos_id, int) else set(eos_id)
    end = next((index for index, token in enumerate(tokens) if token in eos_ids), len(tokens) - 1)
    return tokens[: end + 1]


def generate_canvases(
    generate: Callable[..., Generation],
    model,
    prompt_ids: list[int],
    max_tokens: int,
    canvas_length: int,
    steps: int,
    *,
    stop_ids: Collection[int] = (),
    **settings,
) -> Generation:
    """Decodes canvas after canvas until a stop id is final or max_tokens is reached.

    Every canvas is min(remaining, canvas_length) long and takes what came before it as its prompt. `steps` are those of
    the first canvas; a later, shorter one gets the same steps a token, rounded up. The tokens end with the stop id if
    one was found; no forward pass is run after that is known. `settings` go to `generate` unchanged, noise callbacks
    with positions and steps counted through.
    """
    first_length = min(max_tokens, canvas_length)
    tokens: list[int] = []
    trace: list[Commit] = []
    num_steps = 0
    while len(tokens) < max_tokens:
        length = min(max_tokens - len(tokens), canvas_length)
        done = generate(
            model,
            prompt_ids + tokens,
            length,
            ceil(steps * length / first_length),
            stop_ids=stop_ids,
            **{name: counted_on(value, num_steps, len(tokens)) for name, value in settings.items()},
        )
        trace += [Commit([len(tokens) + p for p in commit.positions], commit.tokens) for commit in done.trace]
        num_steps += done.num_steps
        decided = truncate_at_eos(done.tokens, stop_ids)
        tokens += decided
        if decided[-1] in stop_ids:
            break
    return Generation(tokens, trace, num_steps)


def counted_on(value, steps: int, positions: int):
    """A noise callback told of the steps and positions before this canvas; any other value as it is."""
    if not callable(value):
        return value
    return lambda step, at, *time: value(steps + step, positions + at, *time)

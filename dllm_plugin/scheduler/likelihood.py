"""How likely a model finds given text: which copies of it are forwarded, and what is told of each token. No vLLM, no torch.

Under block-causal attention a text has one chain: each token given all before it, the rest of its block masked. Under full
attention the masks reach to the end of the text, and a sum of samples may take the place of the chain
(ML-GSAI/LLaDA:get_log_likelihood.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dllm_plugin.params import BLOCK, DiffusionParams
from dllm_plugin.scheduler.block_causal import DEFAULT_BLOCK_LENGTH
from dllm_plugin.scheduler.window import FULL, Attention


class ScoredWindow(NamedTuple):
    """A copy of positions ``[start, end)`` of which ``masked`` are masked, and whose tokens at ``scored`` are looked up.

    Positions before ``start`` are seen as they are. Nothing of a copy is kept but the log-probabilities.
    """

    start: int
    end: int
    masked: Sequence[int]
    scored: Sequence[int]

    @property
    def visible(self) -> int:
        return self.end

    @property
    def attention(self) -> Attention:
        return FULL


class GivenText(NamedTuple):
    """Token ids, of which those before ``start`` are context. ``num_logprobs``: others that are told with each token."""

    prompt: Sequence[int]
    start: int
    num_logprobs: int


class Likelihood(ABC):
    """The scoring passes of a request, before its answer: `windows` are next, until it `is_done`.

    ``most_tokens``: what a step may forward. ``num_cached``: positions whose keys and values must be in pages before. ``ids``,
    ``logprobs`` ``[length - 1, 1 + num_logprobs]`` and ``ranks`` ``[length - 1]`` are of all tokens but the first, of which vLLM
    tells nothing; those of the context are certain, and have log-probability 0.
    """

    num_windows: int
    num_cached = 0

    def __init__(self, text: GivenText, most_tokens: int) -> None:
        self.length, self.start, self.most_tokens = len(text.prompt), max(1, text.start), most_tokens
        tokens = np.array(text.prompt[1:], np.int32)
        self.ids = np.repeat(tokens[:, None], 1 + text.num_logprobs, axis=1)
        self.logprobs = np.zeros(self.ids.shape, np.float64)
        self.ranks = np.ones(len(tokens), np.int64)
        self._num_done = 0
        self._windows: list[ScoredWindow] = []

    @property
    def is_done(self) -> bool:
        return self._num_done >= self.num_windows

    @property
    def windows(self) -> list[ScoredWindow]:
        """As many of the next copies as a step may forward, at least one."""
        if not self._windows:
            left = self.most_tokens
            for number in range(self._num_done, self.num_windows):
                window = self._window(number)
                left -= window.end - window.start
                if self._windows and left < 0:
                    break
                self._windows.append(window)
        return self._windows

    def record(self, scores: np.ndarray) -> None:
        """What the present `windows` have told: a row of `worker.records.score` for each scored position, in their order."""
        windows = self.windows
        at = np.array([position - 1 for window in windows for position in window.scored], np.int64)
        self._record(windows, at, scores)
        self._num_done += len(windows)
        self._windows = []

    def _record(self, windows: list[ScoredWindow], at: np.ndarray, scores: np.ndarray) -> None:
        num_others = self.ids.shape[1] - 1
        self.logprobs[at, 0], self.ranks[at] = scores[:, 0], scores[:, 1]
        self.ids[at, 1:] = scores[:, 2 : 2 + num_others]
        self.logprobs[at, 1:] = scores[:, 2 + num_others :]

    @abstractmethod
    def _window(self, number: int) -> ScoredWindow: ...


class BlockChain(Likelihood):
    """Under block-causal attention: pass j reveals the first j tokens of every block, and scores the next ones.

    The text before a block is seen as it is, from pages. Where the logits at i predict token i + 1 the first token of a block
    is that of the row before it, as it is in decoding.
    """

    def __init__(self, text: GivenText, most_tokens: int, block_length: int, shift: int, longest: int) -> None:
        super().__init__(text, most_tokens)
        self.block_length, self.shift, self.longest = block_length, shift, longest
        self.num_cached = (self.length - 1) // block_length * block_length
        positions = range(self.start, self.length)
        self._order = sorted(positions, key=lambda position: (position % block_length, position))
        self.num_windows = len(self._order)

    def _window(self, number: int) -> ScoredWindow:
        position = self._order[number]
        start = position // self.block_length * self.block_length
        end = min(start + self.block_length, self.longest)
        if self.shift and position == start:
            return ScoredWindow(start - 1, start, (), (position,))
        return ScoredWindow(start, end, range(position, end), (position,))


class Chain(Likelihood):
    """Under full attention: each token given those before it, it and all behind it masked."""

    def __init__(self, text: GivenText, most_tokens: int) -> None:
        super().__init__(text, most_tokens)
        self.num_windows = max(0, self.length - self.start)

    def _window(self, number: int) -> ScoredWindow:
        position = self.start + number
        return ScoredWindow(0, self.length, range(position, self.length), (position,))


class MonteCarlo(Likelihood):
    """Under full attention: of the n tokens behind the context k are masked at random, and count n / k times.

    Their sum is a sample, and what is told of a token its share of the mean, 0 where it never was masked. The numbers k of
    the samples lie evenly in 1 .. n behind a random first one, so that each of them is uniform.
    """

    def __init__(self, text: GivenText, most_tokens: int, seed: int, num_samples: int) -> None:
        super().__init__(text, most_tokens)
        self.seed, self.num_samples = seed, num_samples
        self.num_scored = max(0, self.length - self.start)
        self.num_windows = num_samples if self.num_scored else 0
        self.ranks[self.start - 1 :] = 0  # a token has one in each sample
        self._first = int(self._draw(0, 0, 1)[0] * self.num_scored) if self.num_scored else 0

    def _window(self, number: int) -> ScoredWindow:
        num_masked = (self._first + number * self.num_scored // self.num_samples) % self.num_scored + 1
        drawn = self._draw(number, self.start, self.length)
        masked = np.sort(np.argsort(drawn, kind="stable")[:num_masked]) + self.start
        return ScoredWindow(0, self.length, masked.tolist(), masked.tolist())

    def _record(self, windows: list[ScoredWindow], at: np.ndarray, scores: np.ndarray) -> None:
        num_masked = [len(window.masked) for window in windows]
        weight = self.num_scored / np.repeat(num_masked, num_masked) / self.num_samples
        np.add.at(self.logprobs[:, 0], at, weight * scores[:, 0])

    def _draw(self, number: int, start: int, end: int) -> np.ndarray:
        """A number in (0, 1) for each of the positions."""
        import torch

        from dllm_plugin.kernels import philox

        position = torch.arange(start, end)
        zero = torch.zeros_like(position)
        return philox.uniform(zero + self.seed, position, zero + number, stream=philox.MASK).numpy()


def make_likelihood(
    params: DiffusionParams,
    prompt: Sequence[int],
    num_logprobs: int,
    most_tokens: int,
    *,
    shift: int,
    longest: int,
    seed: int,
) -> Likelihood:
    """The scoring passes that the parameters ask for; `Plan` says what the arguments are.

    Raises ValueError where the context leaves nothing to score.
    """
    start = params.likelihood_start
    if start > 0 and start >= len(prompt):
        raise ValueError(
            f"diffusion_likelihood_start must leave something to score, got {start} tokens of context in a prompt of "
            f"{len(prompt)}; lower it, or leave prompt_logprobs out"
        )
    text = GivenText(prompt, start if start >= 0 else len(prompt) + start, num_logprobs)
    if params.strategy == BLOCK:
        return BlockChain(text, most_tokens, params.block_length or DEFAULT_BLOCK_LENGTH, shift, longest)
    if params.likelihood_samples:
        return MonteCarlo(text, most_tokens, seed, params.likelihood_samples)
    return Chain(text, most_tokens)

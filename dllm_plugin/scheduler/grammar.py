"""Answers under a grammar, whose tokens are unmasked in any order: vLLM's matcher stands where the emitted tokens end.

Of the masked positions only the first one has a context that the matcher knows, so it alone gets the grammar's mask, and is
unmasked in every step. What was unmasked to its right without the mask is accepted once the tokens before it are there, or
masked again.
"""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from dllm_plugin.scheduler.output import GrammarStep, Record
from dllm_plugin.scheduler.window import ActiveBlock

if TYPE_CHECKING:
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager


class Constraint:
    """What a grammar lets a request hold. ``unmasked``: tokens by position that are unmasked and not accepted yet.

    ``refused``: a position that is masked again with the next step, and counts as masked from now on.
    """

    def __init__(self, request: "Request", manager: "StructuredOutputManager") -> None:
        self.request = request
        self.manager = manager
        self.unmasked: dict[int, int] = {}
        self.refused: int | None = None
        assert request.sampling_params is not None and request.sampling_params.structured_outputs is not None
        self._is_json = request.sampling_params.structured_outputs.json is not None
        self._num_walked = 0  # tokens by which the matcher is ahead of what was emitted

    def keep(self, written: Iterable[Record]) -> None:
        """Remember what a step has written."""
        self.unmasked |= {record.position: record.token for record in written}

    def accept(self, tokens: list[int], emitted: int) -> list[int]:
        """The first ones of the tokens behind what was ``emitted`` that the grammar takes; all where it has come to its end."""
        accepted = self.manager.validate_tokens(self.request, tokens)
        if (
            self._is_terminated
            or (accepted and accepted[-1] in self._stop_ids)
            or (tokens and self._ends_with(tokens[0]))
        ):
            accepted = tokens
        accepted = self._before_control_character(accepted)
        for position in range(emitted, emitted + len(accepted)):
            self.unmasked.pop(position, None)
        if len(accepted) < len(tokens):
            self.refused = emitted + len(accepted)
            del self.unmasked[self.refused]
        return accepted

    def lay(self, emitted: int, block: ActiveBlock) -> tuple[GrammarStep, dict[int, int]]:
        """What is written and masked before the next step, whose first block is given; and by position how that changes the
        number of masks.

        Tokens that the grammar leaves no choice about are written without a forward pass, all but the last of a block.
        """
        again = {} if self.refused is None else {self.refused: 0}
        forced: dict[int, int] = {}
        self.refused = None
        position, mask = emitted, self._mask()
        while mask is not None:
            token = self.unmasked.get(position)
            if token is None and len(forced) + 1 < block.num_masked and position < block.end:
                token = forced_token(mask)
                if token is not None:
                    forced[position] = token
                    again.pop(position, None)
            if token is None:
                break
            if token in self._stop_ids and allows(mask, token):
                position, mask = position + 1, None
            elif self._walk(token):
                position, mask = position + 1, self._mask()
            else:
                again[position] = 1
                del self.unmasked[position]
                break
        self._walk_back()
        self.unmasked |= forced
        return GrammarStep(emitted, forced, tuple(again), position, mask), again | dict.fromkeys(forced, -1)

    @property
    def _grammar(self) -> Any:
        assert self.request.structured_output_request is not None
        return self.request.structured_output_request.grammar  # compiled before the request was scheduled

    @property
    def _stop_ids(self) -> set[int]:
        assert self.request.sampling_params is not None
        return self.request.sampling_params.all_stop_token_ids

    @property
    def _is_terminated(self) -> bool:
        return self._grammar.is_terminated()

    def _ends_with(self, token: int) -> bool:
        """Whether this token may end the answer now. Guidance's matcher has stopped by then, and takes no token any more."""
        return token in self._stop_ids and ((mask := self._mask()) is None or allows(mask, token))

    def _mask(self) -> np.ndarray | None:
        """The words of the tokens that may come next; None where any may."""
        if self._is_terminated:
            return None
        words = self.manager.grammar_bitmask({self.request.request_id: self.request}, [self.request.request_id], {})
        assert words is not None
        if (words[0] == -1).all():
            return None
        mask = words[0].copy()
        if self._is_json and (words_of := control_characters(self.manager)) is not None:
            controls, whitespace = words_of
            if (mask & controls & ~whitespace).any():  # it is within a string
                mask &= ~controls
        return mask

    def _before_control_character(self, tokens: list[int]) -> list[int]:
        """The first ones of the tokens that the matcher takes next, up to one that only a string without end would have."""
        words_of = control_characters(self.manager) if self._is_json else None
        if words_of is None or not any(allows(words_of[0], token) for token in tokens):
            return tokens
        number = 0
        while number < len(tokens) and ((mask := self._mask()) is None or allows(mask, tokens[number])):
            if not self._walk(tokens[number]):  # it has come to its end
                number = len(tokens)
                break
            number += 1
        self._walk_back()
        return tokens[:number]

    def _walk(self, token: int) -> bool:
        """Have the matcher take a token beyond the emitted ones; False where it does not."""
        if not self._grammar.validate_tokens([token]):
            return False
        self._grammar.accept_tokens(self.request.request_id, [token])
        self._num_walked += 1
        return True

    def _walk_back(self) -> None:
        if self._num_walked:
            self._grammar.rollback(self._num_walked)
            self._num_walked = 0


def allows(mask: np.ndarray, token: int) -> bool:
    """Whether the words of a mask have the bit of a token."""
    return bool(int(mask[token // 32]) >> token % 32 & 1)


def forced_token(mask: np.ndarray) -> int | None:
    """The one token that the words of a mask allow; None where they allow more."""
    words = np.flatnonzero(mask)
    if len(words) != 1:
        return None
    bits = int(mask[words[0]]) & 0xFFFFFFFF
    return int(words[0]) * 32 + bits.bit_length() - 1 if bits & (bits - 1) == 0 else None


@functools.lru_cache(maxsize=1)
def control_characters(manager: "StructuredOutputManager") -> tuple[np.ndarray, np.ndarray] | None:
    """The words of all tokens with characters below a blank, which JSON has in no string, and of those among them that may be
    whitespace outside of one. None where the matcher knows of it.

    XGrammar 0.2 takes them in a string with ``minLength`` or ``maxLength``.
    """
    import xgrammar  # vLLM imports it where a request wants it, too
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    if not isinstance(manager.backend, XgrammarBackend):
        return None
    size = manager.vllm_config.model_config.get_vocab_size()
    vocabulary = xgrammar.TokenizerInfo.from_huggingface(manager.tokenizer, vocab_size=size).decoded_vocab
    words = np.zeros((2, -(-len(vocabulary) // 32) * 32), np.uint8)
    for token, text in enumerate(vocabulary):
        if found := {character for character in text if character < 0x20}:
            words[:, token] = 1, found <= set(b"\t\n\r")
    controls, whitespace = np.packbits(words, axis=1, bitorder="little").view(np.int32)
    return controls, whitespace

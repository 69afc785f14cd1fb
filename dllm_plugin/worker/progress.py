"""How far requests come in the steps that are run: their summaries, read in order, and the runner's output made of them."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
from vllm.v1.outputs import LogprobsLists

from dllm_plugin.params import HOLE
from dllm_plugin.scheduler.output import DiffusionModelRunnerOutput, NewCanvas, Record
from dllm_plugin.scheduler.window import Window
from dllm_plugin.worker.batch import Layout
from dllm_plugin.worker.canvas import CanvasStore, Request
from dllm_plugin.worker.summary import Summary


class Progress:
    """How far the requests of a layout have come in the steps that were run."""

    def __init__(self, layout: Layout, store: CanvasStore) -> None:
        self.layout = layout
        self.mask_token_id = store.mask_token_id
        self.requests = [store.requests[request_id] for request_id in layout.request_ids]
        self.tokens: list[list[int]] = [[] for _ in self.requests]
        self.num_emitted: list[list[int]] = [[] for _ in self.requests]
        self.num_masked: list[list[list[int]]] = [[] for _ in self.requests]  # by step and block
        self.eos_is_taken: set[str] = set()
        self.broken: set[str] = set()
        self.num_edited: dict[str, int] = {}  # by the last step
        self.written: list[list[list[Record]]] = [[] for _ in self.requests]  # by step
        self.emitted: list[list[Record]] = [
            [] for _ in self.requests
        ]  # of tokens whose log-probabilities are asked for

    def read(self, summary: Summary, following: Mapping[str, Window] | None = None) -> bool:
        """Take in the next step's summary; returns whether a token ends a request.

        Also where a block is filled that the ``following`` windows were to go on with.
        """
        report, batch = summary.wait(), summary.batch
        first_block, ended = 0, False
        self._keep(report.records)
        for i, (request, window) in enumerate(zip(self.requests, batch.windows, strict=True)):
            blocks = slice(first_block, first_block + len(window.blocks))
            first_block = blocks.stop
            self.num_masked[i].append(report.masks_left[blocks])
            if following and 0 in report.masks_left[blocks]:
                spans = {block[:2] for block in following[self.layout.request_ids[i]].blocks}
                left = zip(window.blocks, report.masks_left[blocks], strict=True)
                ended |= any(number == 0 and block[:2] in spans for block, number in left)
            self.num_edited[self.layout.request_ids[i]] = num_edited = sum(report.num_edited[blocks])
            settled = settled_below(window, report.masks_left[blocks], num_edited)
            num_new = max(0, min(report.unmasked_prefix[i], settled) - request.emitted)
            if num_new:
                first_new = request.emitted - batch.emitted_before[i]
                new = report.tokens[i][first_new : first_new + num_new]
                self.tokens[i] += new
                self._tell(i, new)
                if self._is_broken(request, new):
                    self.broken.add(self.layout.request_ids[i])
                    ended = True
                request.emitted += num_new
                ended = ended or request.emitted == window.settles_below or not request.canvas.ends_at.isdisjoint(new)
            self.num_emitted[i].append(num_new)
        if self.layout.needs.pipelined:
            taken = zip(self.layout.request_ids, report.eos_is_taken, strict=True)
            self.eos_is_taken = {request_id for request_id, is_taken in taken if is_taken}
        return ended

    def _is_broken(self, request: Request, tokens: list[int]) -> bool:
        """Whether one of the next tokens was not chosen: it is the mask, which only a template may hold as text."""
        if self.mask_token_id not in tokens:
            return False
        first = request.emitted - len(request.canvas.token_ids)
        pairs = zip(tokens, request.canvas.canvas_ids[first:], strict=False)
        return any(token == self.mask_token_id and pinned == HOLE for token, pinned in pairs)

    def _keep(self, records: Sequence[tuple[int, Record]]) -> None:
        """Remember what was written in a step until it is emitted."""
        for written in self.written:
            written.append([])
        for i, record in records:
            self.written[i][-1].append(record)
            self.requests[i].records[record.position] = record

    def _tell(self, i: int, tokens: list[int]) -> None:
        """Take the records of the next tokens of a request, which are emitted now."""
        request = self.requests[i]
        if request.canvas.num_logprobs < 0:
            return
        for position, token in enumerate(tokens, request.emitted):
            record = request.records.get(position)
            self.emitted[i].append(record or Record.of_given(position, token, likeliest(token, request.canvas)))

    def with_masks_left(self, windows: dict[str, Window]) -> dict[str, Window]:
        """The windows of the next step, with the number of masks that the last one has left in their blocks."""
        if not self.num_masked[0]:
            return windows
        left = {
            request_id: steps[-1] for request_id, steps in zip(self.layout.request_ids, self.num_masked, strict=True)
        }
        return {
            request_id: window._replace(
                blocks=tuple(
                    block._replace(num_masked=number)
                    for block, number in zip(window.blocks, left[request_id], strict=True)
                )
            )
            if left[request_id] and all(left[request_id])  # else it goes on to another block
            else window
            for request_id, window in windows.items()
        }

    def output(self) -> DiffusionModelRunnerOutput:
        request_ids, needs = self.layout.request_ids, self.layout.needs
        canvases = [request.canvas for request in self.requests]
        asked = [i for i, canvas in enumerate(canvases) if canvas.params.trajectory or canvas.has_grammar]
        return DiffusionModelRunnerOutput(
            req_ids=list(request_ids),  # not the layout's own: the scheduler adds to it
            req_id_to_index={request_id: i for i, request_id in enumerate(request_ids)},
            sampled_token_ids=self.tokens,
            num_emitted=dict(zip(request_ids, self.num_emitted, strict=True)),
            num_masked=dict(zip(request_ids, self.num_masked, strict=True)),
            eos_is_taken=self.eos_is_taken,
            num_edited=self.num_edited,
            broken=self.broken,
            written={request_ids[i]: self.written[i] for i in asked},
            logprobs=logprobs_lists(self.emitted, needs.num_logprobs) if needs.num_logprobs >= 0 else None,
        )


def likeliest(token: int, canvas: NewCanvas) -> Sequence[int]:
    """What is told beside a token that is certain: it comes first, and of the others, which are all as unlikely, the lowest."""
    lowest = [other for other in range(canvas.num_logprobs) if other != token]
    return canvas.logprob_ids or [token, *lowest][: canvas.num_logprobs]


def logprobs_lists(records: list[list[Record]], num_others: int) -> LogprobsLists:
    """vLLM's message of the emitted tokens of all requests; those that ask for nothing have none in it."""
    flat = [record for one in records for record in one]
    ids, logprobs = np.empty((len(flat), 1 + num_others), np.int32), np.empty((len(flat), 1 + num_others), np.float32)
    for row, record in enumerate(flat):
        # written beside requests that asked for more or less; no request reads more than it has asked for itself
        for told, values in ((ids, record.ids), (logprobs, record.logprobs)):
            told[row] = values[0]
            told[row, : len(values)] = values[: 1 + num_others]
    ranks = np.array([record.rank for record in flat], np.int64)
    return LogprobsLists(ids, logprobs, ranks, [*accumulate(map(len, records), initial=0)][:-1])


def settled_below(window: Window, masks_left: list[int], num_edited: int) -> int:
    """What is unmasked below this position is settled after the window's step, which left so many masks in its blocks."""
    if window.settles == "at_once":
        return window.settles_below
    is_still = num_edited == 0 and all(block.num_masked == 0 for block in window.blocks)
    is_settled = not any(masks_left) and (is_still or window.settles == "when_filled")
    return window.settles_below if is_settled else window.blocks[0].start

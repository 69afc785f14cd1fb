"""Block-diffusion decoding: SDAR, LLaDA2.0 and 2.1 (editing), Stable-DiffCoder, DreamReasoner; Fast-dLLM v2 apart.

One loop for the families without a shift, after JetAstra/SDAR:generate.py, Labman42/JetEngine:jetengine/engine and
inclusionAI/LLaDA2.X's `generate` (a copy: ZHZisZZ/dllm:dllm/pipelines/{llada2,llada21}/models), one for Fast-dLLM v2.
Blocks are counted from position 0 of the sequence, so that a prompt's tail shares the first block with masks.

There is no key-value cache. A row sees its own block and the final blocks before it, nothing later; recomputing these
under the block-causal mask gives what a cache of final blocks gives. (Fast-dLLM's cache inside a block is another
matter: it is stale, and so it is kept, see `generate_fast_dllm_v2`.)

`Generation.trace` has one entry per forward pass, whose positions are counted from the start of the answer and may lie
behind its end; a pass in which an editing decoder finds nothing left to change has an empty one. The published loops
run one more pass over each finished block, which writes its keys and values and decides nothing: it is not run here.
Noise callbacks get the pass in the block, from 0, and absolute positions.

Deviations beyond those of `decoding`, all deliberate:

- A block is decoded at full length to its absolute edge, behind the answer's end too; the answer is then cut. So are the
  published ones of SDAR and LLaDA2, but SDAR's answer is not cut; Stable-DiffCoder's last block ends with the answer,
  which is `shorten_last_block`.
- No pass is run once the answer is settled, or ends in a stop id with no mask before it. The published loops finish the
  block. Editing may change what stands, so there the block is finished first.
- Quotas are those of a full block and belong to the number of the pass: block // steps, the remainder one each to the
  first. Stable-DiffCoder shares out the masks of a partly filled first block instead, and LLaDA2.0 lowers its steps for
  answers shorter than them. A quota never exceeds the masks there are; SDAR's may, and then overwrites the prompt.
- A threshold is passed by what is greater, as in all of them but Stable-DiffCoder's.
- Every pass unmasks at least one position, so that no block is left with masks.
- LLaDA2.1's released mask hides nothing, because it is 0 and 1 where an attention mask is added: 2.0's is meant.
- Temperature 0 takes the likeliest token, as LLaDA2.1's code does; LLaDA2.0's draws one from softmax(logits) there, and
  SDAR's divides by 0.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from .block_models import BlockModel, block_causal
from .decoding import Commit, Generation, PositionGumbel, TokenGumbel, Uniforms, choose, most_confident, truncate_at_eos
from .dream import min_p_filter, top_k_filter, top_p_filter
from .fast_dllm import admitted
from .llada import transfer_counts

HOLE = -1  # in a template: to be decoded


class BlockPredictor(Protocol):
    """What `generate` needs of a model; tests of decoding rules pass tables of logits instead of a checkpoint."""

    mask_token_id: int
    shift: int

    def logits(self, ids: Tensor, visible: Tensor) -> Tensor: ...


@dataclass
class Text:
    """A prompt and what is decoded after it, up to a block's edge; `given` never changes, `masked` is yet to be decided."""

    prompt_ids: Sequence[int]
    max_tokens: int
    end: int
    mask_token_id: int
    stop_ids: Collection[int]
    template: Sequence[int] | None
    trace: list[Commit] = field(default_factory=list)

    def __post_init__(self) -> None:
        template = list(self.template or [HOLE] * self.max_tokens)
        if len(template) != self.max_tokens:
            raise ValueError(f"a template has an entry per token of the answer: {len(template)}, not {self.max_tokens}")
        self.start = len(self.prompt_ids)
        beyond = self.end - self.start - self.max_tokens
        self.ids = torch.tensor([*self.prompt_ids, *template, *[HOLE] * beyond])
        self.given = torch.ones(self.end, dtype=torch.bool)
        self.given[self.start :] = self.ids[self.start :] != HOLE
        self.masked = ~self.given
        self.ids[self.masked] = self.mask_token_id

    def commit(self, positions: Tensor, tokens: Tensor) -> None:
        order = positions.argsort()
        positions, tokens = positions[order], tokens[order]
        self.ids[positions] = tokens
        self.masked[positions] = False
        self.trace.append(Commit((positions - self.start).tolist(), tokens.tolist()))

    @property
    def settled(self) -> list[int]:
        """The tokens of the answer before its first mask."""
        answer = slice(self.start, self.start + self.max_tokens)
        masked = self.masked[answer]
        first = int(masked.int().argmax()) if masked.any() else self.max_tokens
        return self.ids[answer][:first].tolist()

    @property
    def finished(self) -> bool:
        return len(self.settled) == self.max_tokens or any(token in self.stop_ids for token in self.settled)

    def result(self) -> Generation:
        return Generation(truncate_at_eos(self.settled, self.stop_ids), self.trace, len(self.trace))


def generate(
    model: BlockPredictor,
    prompt_ids: Sequence[int],
    max_tokens: int,
    *,
    block_length: int,
    steps_per_block: int | None = None,
    remasking: str = "low_confidence",
    threshold: float | None = None,
    factor: float | None = None,
    entropy_bound: float | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    confidence: str = "tempered",
    alg_temp: float | None = None,
    gumbel: TokenGumbel | None = None,
    position_gumbel: PositionGumbel | None = None,
    uniforms: Uniforms | None = None,
    sub_block_length: int | None = None,
    stop_ids: Collection[int] = (),
    template: Sequence[int] | None = None,
    edit_threshold: float | None = None,
    max_post_steps: int = 16,
    shorten_last_block: bool = False,
) -> Generation:
    """An answer of max_tokens tokens, or up to and including the first of `stop_ids`.

    Pass t of a block unmasks the best positions, the t-th quota of steps_per_block (None: one a pass), by `remasking`:
    "low_confidence" takes the highest `confidence` of the chosen token (see `sample`), "entropy" the lowest entropy in
    nats of softmax(logits / temperature), "sequential" the leftmost, "random" the highest of `uniforms`. A `threshold`
    adds every confidence above it, a `factor` as many as `fast_dllm.admitted` says, an `entropy_bound` as many of the
    lowest entropies as have a sum below it. An `alg_temp` takes `position_gumbel` and orders by confidence / alg_temp +
    noise. A temperature takes `gumbel`. A template pins tokens; HOLE is one to decode. With a sub_block_length a block
    is decoded part by part, each with steps_per_block passes of its own.

    An `edit_threshold` replaces tokens of the block that were neither given nor masked before the pass, where another
    has a probability above it. A block is then final after a pass that had no mask to decide and changed nothing, or
    after max_post_steps passes without a mask.
    """
    check(model, remasking, threshold, factor, entropy_bound, alg_temp, confidence)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "confidence": confidence}
    end = len(prompt_ids) + max_tokens
    if not shorten_last_block:
        end = -(-end // block_length) * block_length
    text = Text(prompt_ids, max_tokens, end, model.mask_token_id, stop_ids, template)
    length = sub_block_length or block_length
    quotas = transfer_counts(length, steps_per_block or length)
    editing = edit_threshold is not None

    for start in range(len(prompt_ids) // block_length * block_length, end, block_length):
        block = slice(start, min(start + block_length, end))
        if text.finished:
            break
        if text.given[block].all():  # nothing in it can change
            continue
        post_steps = 0
        passes = count()
        for first in range(block.start, block.stop, length):
            part = slice(first, min(first + length, block.stop))
            for part_step in count():
                any_masked = bool(text.masked[part].any())
                if editing:
                    post_steps += not any_masked
                    if post_steps > max_post_steps:
                        break
                elif not any_masked or text.finished:
                    break

                step = next(passes)
                rows = first + (~text.given if editing else text.masked)[part].nonzero()[:, 0]
                logits = model.logits(text.ids[: block.stop], block_causal(block.stop, block_length))[rows]
                noise = gumbel(step, rows) if temperature > 0 else None
                probability, entropy, chosen = sample(logits, model.mask_token_id, noise=noise, **settings)

                masked = text.masked[rows]
                candidates = rows[masked]
                if remasking == "random":
                    score = uniforms(step, candidates)
                else:
                    score = {
                        "low_confidence": probability[masked],
                        "entropy": -entropy[masked],
                        "sequential": -candidates.double(),
                    }[remasking]
                if alg_temp:
                    score = score.double() / alg_temp + position_gumbel(step, candidates)
                # The union of the quota's best and of all that pass is a number of the best: whichever of the two is
                # larger. With a threshold that is the published "all above it if they fill the quota, else its best".
                number = max(1, quotas[part_step] if part_step < len(quotas) else 0)
                if threshold is not None:
                    number = max(number, int((score > threshold).sum()))
                if factor is not None and len(score):
                    number = max(number, admitted(score, factor))
                if entropy_bound is not None:
                    number = max(number, int((entropy[masked].sort().values.cumsum(0) < entropy_bound).sum()))
                unmasked = masked.nonzero()[:, 0][most_confident(score, number)]

                edited = torch.zeros(0, dtype=torch.long)
                if editing:
                    edited = (~masked & (probability > edit_threshold) & (chosen != text.ids[rows])).nonzero()[:, 0]
                changed = torch.cat([unmasked, edited])
                text.commit(rows[changed], chosen[changed])
                if not any_masked and len(edited) == 0:
                    break
    return text.result()


def check(model, remasking, threshold, factor, entropy_bound, alg_temp, confidence) -> None:
    if model.shift:
        raise ValueError("a model with a shift begins each block with a token of its own; use generate_fast_dllm_v2")
    if remasking not in ("low_confidence", "entropy", "sequential", "random"):
        raise ValueError(f"remasking is low_confidence, entropy, sequential or random, not {remasking!r}")
    if confidence not in CONFIDENCES:
        raise ValueError(f"confidence is one of {', '.join(CONFIDENCES)}, not {confidence!r}")
    if (threshold, factor) != (None, None) and remasking != "low_confidence":
        raise ValueError(f"a threshold or factor is compared with probabilities; {remasking} has none: leave it out")
    if entropy_bound is not None and remasking != "entropy":
        raise ValueError(f"an entropy_bound takes the lowest entropies; set remasking to entropy, not {remasking!r}")
    if alg_temp and (remasking == "sequential" or (threshold, factor, entropy_bound) != (None, None, None)):
        raise ValueError(
            "alg_temp draws the order of positions; leave out sequential, threshold, factor and entropy_bound"
        )


CONFIDENCES = ("tempered", "filtered", "plain")


def sample(
    logits: Tensor,
    mask_token_id: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    confidence: str = "tempered",
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, entropy and token [rows] of logits [rows, vocabulary], which are divided, then min_p, top_k, top_p.

    `confidence` says under which distribution the token's probability is taken: "tempered", softmax(logits /
    temperature), as JetEngine and LMDeploy do; "filtered", what top_k and top_p leave of it, as SDAR's and LLaDA2's own
    code does; "plain", softmax(logits), as Stable-DiffCoder does. At temperature 0 logits stay undivided and the token
    is the likeliest. The entropy is that of the tempered distribution. top_k keeps ties with the k-th, top_p the token
    that crosses it; None and 0, or 1, switch them off. Where they leave only the mask, the token is the likeliest other.
    """
    tempered = logits / temperature if temperature > 0 else logits
    kept = tempered
    if min_p:
        kept = min_p_filter(kept, min_p)
    if top_k:
        kept = top_k_filter(kept, top_k)
    if top_p is not None and top_p < 1:
        kept = top_p_filter(kept, top_p)
    filtered = torch.softmax(kept, dim=-1)
    probs = torch.softmax(tempered, dim=-1)

    chosen = choose(tempered, mask_token_id)
    if temperature > 0:
        scores = torch.where(filtered > 0, kept.double() + noise, -torch.inf)
        scores[:, mask_token_id] = -torch.inf
        chosen = torch.where(scores.isinf().all(dim=-1), chosen, scores.argmax(dim=-1))
    under = {"tempered": probs, "filtered": filtered, "plain": torch.softmax(logits, dim=-1)}[confidence]
    return under.gather(1, chosen[:, None])[:, 0], torch.special.entr(probs).sum(dim=-1), chosen


def generate_fast_dllm_v2(
    model: BlockModel,
    prompt_ids: Sequence[int],
    max_tokens: int,
    *,
    block_length: int = 32,
    sub_block_length: int = 8,
    threshold: float | None = None,
    block_cache: bool = False,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    confidence: str = "tempered",
    gumbel: TokenGumbel | None = None,
    stop_ids: Collection[int] = (),
    template: Sequence[int] | None = None,
) -> Generation:
    """Fast-dLLM v2: sub-blocks of a block from left to right, each until it has no mask; row i predicts i + 1.

    The first token of a block is its seed, an ordinary autoregressive one: the likeliest after the last row of the final
    block before it, at every temperature. A seed is an input of the rest of its block, so it takes a forward pass of its
    own (the published commit pass), which the trace shows; `gumbel` counts the other passes of the block.

    A pass runs over the whole block, and unmasks every position of the sub-block with a confidence above `threshold`,
    at least the best. The published shift is self-first: S = [L[0], L[0], ..., L[n - 2]], so that the first row of the
    block is used for its own position and for the next. That position is a seed or given, never masked, so nothing
    comes of it. In the passes over a sub-block alone it is never masked either.

    `block_cache` runs these: a pass runs over the sub-block, and all of the block outside it keeps the keys and values
    of the pass that last ran over it. The whole block is run again where the first position of the sub-block is masked,
    and in the first pass of a block.

    Deviations beyond those of the module, from Satgoy152/DualDiffusion:FastDLLM_inferencing/Fast_dLLM_v2_7B/modeling.py:
    a prompt of exactly one block is a final block like any other (there it is neither forwarded nor followed by a
    seed); a new block does not begin with the keys and values of the last one (as in the batched
    ydshi0/Fast-dLLM:v2/generation_functions.py); every row draws its own token at a temperature; max_tokens need not be
    a multiple of the block.
    """
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "confidence": confidence}
    end = -(-(len(prompt_ids) + max_tokens) // block_length) * block_length
    text = Text(prompt_ids, max_tokens, end, model.mask_token_id, stop_ids, template)
    for start in range(len(prompt_ids) // block_length * block_length, end, block_length):
        if text.finished:
            break
        if text.masked[start]:
            rows = model.logits(text.ids[:start], block_causal(start, block_length))[-1:]
            text.commit(torch.tensor([start]), choose(rows, model.mask_token_id))
        stop = start + block_length
        in_block = block_pass(model, text, start, stop, block_length)
        passes = count()
        for first in range(start, stop, sub_block_length):
            sub_block = slice(first, min(first + sub_block_length, stop))
            while text.masked[sub_block].any() and not text.finished:
                candidates = first + text.masked[sub_block].nonzero()[:, 0]
                step = next(passes)
                alone = block_cache and step > 0 and not text.masked[first]
                logits = in_block(sub_block.start, sub_block.stop) if alone else in_block(start, stop)
                logits = logits[candidates - 1 - (first if alone else start)]
                noise = gumbel(step, candidates) if temperature > 0 else None
                probability, _, chosen = sample(logits, model.mask_token_id, noise=noise, **settings)
                number = 1 if threshold is None else max(1, int((probability > threshold).sum()))
                accepted = most_confident(probability, number)
                text.commit(candidates[accepted], chosen[accepted])
    return text.result()


def block_pass(model: BlockModel, text: Text, start: int, stop: int, block_length: int):
    """A forward pass over a part of the block [start, stop), on the exact keys and values of all that is before it."""
    visible = block_causal(stop, block_length)
    cache = model.new_cache(stop)
    if start:
        model.forward(text.ids, 0, start, visible[:start], cache)
    return lambda first, last: model.forward(text.ids, first, last, visible[first:last], cache)

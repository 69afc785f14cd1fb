"""What tests of refusals share: engines that stay, and what an error and its causes say."""

from support.cases import PolicyCase, difference
from support.checkpoints import folder
from support.engines import new_engine, scheduler

PROMPT = [11, 12, 13]
KEPT: list = []  # closing an engine takes vLLM's process groups from the others


def engine_with(checkpoint, **settings):
    llm = new_engine(folder(checkpoint), **settings)
    KEPT.append(llm)
    return llm


def chain(error):
    """An exception's text with that of everything that led to it."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def serves(llm, checkpoint="llada"):
    """The engine still gives the reference's answer, and holds nothing back."""
    case = PolicyCase(checkpoint, "low_confidence", 6, prompt=5)
    output = llm.generate([{"prompt_token_ids": case.prompt_ids}], case.sampling_params, use_tqdm=False)[0]
    assert not difference(case, output)
    assert not scheduler(llm).requests and not scheduler(llm).denoising

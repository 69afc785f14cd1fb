"""What is known of a model family beyond its config.json. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """One diffusion language model family.

    ``shifted``: the logits at position i predict token i + 1, as in an autoregressive model (Dream); otherwise they
    predict token i (LLaDA). ``remasking``: the policy used when a request names none. ``turn_end``: the special token
    that ends an answer before the padding of EOS begins; LLaDA's ``confidence`` suppression holds it back with EOS.
    """

    name: str
    shifted: bool
    remasking: str
    turn_end: str


LLADA = Family("LLaDA", shifted=False, remasking="low_confidence", turn_end="<|eot_id|>")
DREAM = Family("Dream", shifted=True, remasking="origin", turn_end="<|im_end|>")

# The names published checkpoints carry (LLaDAModelLM, DreamModel) and ours.
FAMILIES: dict[str, Family] = {
    "LLaDAModelLM": LLADA,
    "LLaDAForDiffusionLM": LLADA,
    "DreamModel": DREAM,
    "DreamForDiffusionLM": DREAM,
}


def family_of(architecture: str) -> Family:
    """The family of a HF architecture name. Raises ValueError for one that is not a diffusion language model."""
    if architecture not in FAMILIES:
        raise ValueError(
            f"{architecture} is not a diffusion language model known to dllm_plugin (known: {', '.join(FAMILIES)}); "
            "serve it without --worker-cls dllm_plugin.worker.DiffusionWorker"
        )
    return FAMILIES[architecture]

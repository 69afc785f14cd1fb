"""Remasking policies, one record each: how many positions a step unmasks, and which. Standard library only.

A policy names the algorithm of the public decoder it comes from. Any policy runs on any family.
"""

from dataclasses import dataclass

# How many positions of a block a step unmasks (scheduler/blockwise.py).
SCHEDULES = (
    "even",  # the same number in every step, larger shares first
    "time",  # a share of what is masked, as time runs from 1 to eps
    "drawn",  # those whose own number the time passes
)

# What positions are ranked by, highest first (worker/ranking.py); the worker knows a ranking by its index.
RANKINGS = (
    "probability",  # of the chosen token
    "margin",  # of the best token over the next
    "negative_entropy",
    "step_number",  # drawn anew in every step
    "own_number",  # drawn once for a position
    "left_to_right",
)


@dataclass(frozen=True, slots=True)
class Policy:
    """One remasking policy. Raises ValueError for a schedule or ranking that nobody implements.

    ``source``: where the algorithm is published, as owner/name:path. ``tempered``: confidences are of the distribution that
    tokens are drawn from, divided by the temperature, not of the plain one. ``filters_greedy``: ``top_p`` and ``top_k`` shape
    confidences at temperature 0 too. ``ordered``: positions are taken from an order, which ``alg_temp`` can make random;
    False where each position decides by itself. ``by_probability``: the policy of the same decoder that ranks by
    probability, which is what a threshold compares.
    """

    name: str
    source: str
    schedule: str
    ranking: str
    by_probability: str
    tempered: bool = False
    filters_greedy: bool = False
    ordered: bool = True

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("ranking", RANKINGS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(
                    f"policy {self.name!r} has {name} {value!r}, which nobody implements; take one of {known}"
                )

    @property
    def is_by_probability(self) -> bool:
        return self.ranking == "probability"


def _llada(name: str, ranking: str, source: str = "ML-GSAI/LLaDA:generate.py") -> Policy:
    return Policy(name, source, schedule="even", ranking=ranking, by_probability="low_confidence")


def _dream(name: str, ranking: str, schedule: str = "time", ordered: bool = True) -> Policy:
    return Policy(
        name,
        "Dream-org/Dream-v0-Instruct-7B:generation_utils.py",
        schedule,
        ranking,
        by_probability="maskgit_plus",
        tempered=True,
        filters_greedy=True,
        ordered=ordered,
    )


def by_name(*policies: Policy) -> dict[str, Policy]:
    """The policies by name. Raises ValueError where ``by_probability`` of one is none of those that rank by probability."""
    probable = [policy.name for policy in policies if policy.is_by_probability]
    for policy in policies:
        if policy.by_probability not in probable:
            raise ValueError(
                f"policy {policy.name!r} has by_probability {policy.by_probability!r}, which is no policy that ranks by "
                f"probability; take one of {probable}"
            )
    return {policy.name: policy for policy in policies}


POLICIES = by_name(
    _llada("low_confidence", "probability"),
    _llada("random", "step_number"),
    _llada("sequential", "left_to_right", source="ours"),
    _dream("origin", "own_number", schedule="drawn", ordered=False),
    _dream("maskgit_plus", "probability"),
    _dream("topk_margin", "margin"),
    _dream("entropy", "negative_entropy"),
)

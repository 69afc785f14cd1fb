"""Who takes part in a step whose token budget cannot hold the windows of all running requests. Standard library only."""

import itertools
from collections.abc import Mapping


class Turns:
    """Deals out steps so that a request waits for each of its neighbours at most once.

    Requests stand in a queue. A step serves its head, and then, in the order of the queue, every request whose window still
    fits the budget; who was served goes to the end, and so does who is new. A window larger than the budget runs alone.

    While a request waits, each request before it in the queue is served at most once. A request with a window of w tokens
    sits a step out only if those before it take more than budget - w of it, so it waits at most S / (budget - w + 1)
    steps, S the sum of its neighbours' windows, and never more steps than it has neighbours.

    A request of ``stride`` s is owed a step in every s-th round only, in which its neighbours of stride 1 have s.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        # of every request: the round in which it is owed a step, and a number that grows with who was served or came later
        self._queue: dict[str, tuple[int, int]] = {}
        self._count = itertools.count()

    def take(self, num_tokens: Mapping[str, int], strides: Mapping[str, int] | None = None) -> list[str]:
        """The requests of the next step, in the order of ``num_tokens``, which holds the window of each that runs.

        ``strides``: of each request, at least 1; None: all 1.
        """
        if sum(num_tokens.values()) <= self.budget:
            self._queue.clear()  # all are served, and so nobody is owed anything
            return list(num_tokens)
        now = min((self._queue[one][0] for one in num_tokens if one in self._queue), default=0)
        due = {one: now + (strides[one] if strides else 1) for one in num_tokens}
        self._queue = {one: self._queue.get(one) or (due[one], next(self._count)) for one in num_tokens}
        left = self.budget
        served: set[str] = set()
        for one in sorted(num_tokens, key=self._queue.__getitem__):
            if num_tokens[one] <= left or not served:
                served.add(one)
                self._queue[one] = due[one], next(self._count)
                left -= num_tokens[one]
        return [one for one in num_tokens if one in served]

"""Agreement of all processes on the steps after which they save and stop, without waiting for each other."""

import collections
from typing import Any

import jax
import numpy as np

SAVE, STOP = 1, 2  # requests; the larger number takes precedence
_DELAY = 2  # number of steps after which a request is read; its step has then finished, so reading does not block


class Agreement:
    """Makes every process save and stop after the same step.

    In a run with one process, a request takes effect at once. In a run with several, each process attaches its request
    to its part of the batch. The training step returns the maximum over all processes (see
    `xdim_jax.training.step.make_train_step`), and each process reads that maximum two steps later.
    """

    def __init__(self) -> None:
        self._single = jax.process_count() == 1
        self._unread: collections.deque[Any] = collections.deque()

    def attach(self, samples: int, request: int) -> dict[str, np.ndarray]:
        """Return a batch entry with the request of this process for each sample; none if there is one process only."""
        return {} if self._single else {"request": np.full(samples, request, np.int32)}

    def read(self, metrics: dict[str, Any], request: int) -> int:
        """Return the request that takes effect after a step: 0, `SAVE` or `STOP`.

        Args:
            metrics: Metrics of the step. With several processes, the entry ``request`` is removed.
            request: Request of this process, which takes effect at once if there is no other process.
        """
        if self._single:
            return request
        self._unread.append(metrics.pop("request"))
        if len(self._unread) <= _DELAY:
            return 0
        agreed = int(jax.device_get(self._unread.popleft()))
        if agreed == SAVE:
            self._unread.clear()  # the steps in between repeat this request
        return agreed

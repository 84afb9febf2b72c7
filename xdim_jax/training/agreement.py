"""Agreement of all processes on when to save and when to stop, without waiting for one another."""

import collections
from typing import Any

import jax
import numpy as np

SAVE, STOP = 1, 2  # requests, in order of precedence
_DELAY = 2  # steps after which a request is read; by then its step has finished, so reading does not block


class Agreement:
    """Makes every process save and stop after the same step.

    In a run with one process, a request takes effect at once. In a run with several, each process attaches its request
    to its share of the batch. The training step returns the maximum over all processes (see
    `xdim_jax.training.step.make_train_step`), and each process reads that maximum two steps later.
    """

    def __init__(self) -> None:
        self._single = jax.process_count() == 1
        self._unread: collections.deque[Any] = collections.deque()

    def attach(self, samples: int, request: int) -> dict[str, np.ndarray]:
        """Return the entries that carry this process's request in a batch of ``samples`` samples."""
        return {} if self._single else {"ask": np.full(samples, request, np.int32)}

    def read(self, metrics: dict[str, Any], request: int) -> int:
        """Return the request that takes effect after a step: 0, `SAVE` or `STOP`.

        Args:
            metrics: Metrics of the step. With several processes, the entry ``ask`` is removed.
            request: Request of this process, used if there is no other process.
        """
        if self._single:
            return request
        self._unread.append(metrics.pop("ask"))
        if len(self._unread) <= _DELAY:
            return 0
        agreed = int(jax.device_get(self._unread.popleft()))
        if agreed == SAVE:
            self._unread.clear()  # the requests of the steps in between are repetitions of this one
        return agreed

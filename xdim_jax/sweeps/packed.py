"""A worker that trains several trials in one program; see `xdim_jax.training.pack`."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdim_jax.base import bucket, log
from xdim_jax.base.config import Config, load_config
from xdim_jax.base.errors import UserError
from xdim_jax.base.signals import REQUEUE, StopRequest
from xdim_jax.sweeps import study as studies
from xdim_jax.sweeps import worker
from xdim_jax.sweeps.space import overrides_of
from xdim_jax.training.pack import Member, Pack


@dataclasses.dataclass
class _Held:
    """A trial of this worker: it waits for a place, or has one."""

    trial: Any
    config: Config
    beat: contextlib.ExitStack  # its signs of life, and what follows its workdir into a bucket
    member: Member | None = None
    told: int = 0  # validations that the study knows
    looked: float = dataclasses.field(default_factory=time.monotonic)  # when it was last seen to be ours


class PackedWorker:
    """Takes trials of a study and trains up to ``slots`` of them at a time; a place that becomes free is taken again.

    A trial whose program is another waits until the pack is empty.

    Args:
        study: of `xdim_jax.sweeps.study`.
        job: what all trials share.
        stop: heard after every step.
        slots, layout: of the pack.
        beat: seconds between signs of life.
        grace: seconds after which a silent worker is dead.
    """

    def __init__(
        self,
        study: Any,
        job: worker.Job,
        stop: StopRequest,
        *,
        slots: int,
        layout: str,
        beat: float = studies.BEAT,
        grace: float = studies.GRACE,
    ):
        self._study, self._job, self._stop = study, job, stop
        self._slots, self._layout, self._beat, self._grace = slots, layout, beat, grace
        self._pack: Pack | None = None
        self._held: list[_Held] = []
        self._asks = 0.0  # when to ask for a further trial, after there was none

    def work(self, *, wait: bool = True) -> int:
        """As `xdim_jax.sweeps.worker.work`."""
        try:
            while True:
                self._fill()
                if self._pack is not None and any(held.member for held in self._held):
                    self._advance(self._pack)  # after a signal, one more step, which saves
                elif self._stop.signal or not worker.stay(
                    self._study, self._stop, wait=wait, seconds=min(self._beat, 2.0)
                ):
                    break
                else:
                    self._asks = 0.0
        finally:
            for held in list(self._held):
                self._end(held, REQUEUE)
        return self._stop.status if self._stop.signal else 0

    def _fill(self) -> None:
        """Trials take places while there are any of both."""
        while not self._stop.signal:
            held = next((h for h in self._held if h.member is None), None)
            if held is None:
                if (self._pack is not None and not self._pack.free) or time.monotonic() < self._asks:
                    return
                worker.revive(self._study, self._grace)
                trial = studies.take(self._study, self._job.trials)
                if trial is None:
                    self._asks = time.monotonic() + self._beat
                    return
                held = self._hold(trial)
            with self._failing(held):
                if self._pack is None or not self._pack.fits(held.config):
                    if len(self._held) > 1:
                        return  # until the pack is empty
                    self._pack = Pack(held.config, self._slots, self._layout, self._stop)
                address = worker.address_of(self._job.root, studies.origin_of(held.trial))
                workdir = held.beat.enter_context(bucket.workdir(address))
                held.member = self._pack.add(held.config, workdir)

    def _hold(self, trial: Any) -> _Held:
        beat = contextlib.ExitStack()
        beat.enter_context(studies.Beat(self._study, trial, self._beat))
        worker.draw(trial, self._job)
        config = load_config(self._job.config, [*self._job.overrides, *overrides_of(trial.params)])
        held = _Held(trial, config, beat)
        self._held.append(held)
        return held

    def _advance(self, pack: Pack) -> None:
        try:
            pack.step()
        except Exception as error:  # of the program: out of memory, a fault of the compiler
            text = f"{type(error).__name__}: {str(error).strip()[:500]}"
            for held in [h for h in self._held if h.member]:
                self._end(held, 1, error=text)
            self._pack = None
            log.warn(f"a pack of {pack.slots} ({pack.layout}) cannot go on: {text}")
            return
        for held in [h for h in self._held if h.member]:
            self._look(held)

    def _look(self, held: _Held) -> None:
        member, lost = held.member, False
        assert member is not None
        pruned, run = False, member.opened.run
        if member.controller.steps_done % run.per_epoch == 0 or not member.running:
            held.told, before = worker.report(held.trial, run.workdir, held.told), held.told
            pruned = held.told > before and member.running and held.trial.should_prune()
        if time.monotonic() - held.looked > self._beat:
            held.looked, lost = time.monotonic(), studies.lost(self._study, held.trial)
        if member.error:
            self._end(held, 2, error=member.error)
        elif pruned or lost or not member.running:
            # a signal may have cut off the validation after the last step: then it is not complete
            self._end(held, REQUEUE if pruned or lost or self._stop.signal else 0, pruned=pruned)

    @contextlib.contextmanager
    def _failing(self, held: _Held) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self._end(held, 2, error=str(error))

    def _end(self, held: _Held, status: int, *, pruned: bool = False, error: str = "") -> None:
        """A trial leaves, and the study is told."""
        self._held.remove(held)
        self._asks = 0.0
        if held.member is not None and self._pack is not None:
            held.member.error = held.member.error or error
            try:
                self._pack.remove(held.member)
            except UserError as failure:  # its last checkpoint could not be written
                status, error = status or 2, error or str(failure)
        try:
            held.beat.close()
        except UserError as failure:  # what it wrote could not follow
            status, error = status or 2, error or str(failure)
        worker.tell(self._study, held.trial, self._workdir(held), status, pruned=pruned, error=error)

    def _workdir(self, held: _Held) -> Path:
        return worker.workdir_of(self._job.root, studies.origin_of(held.trial))

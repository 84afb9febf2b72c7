"""A worker that trains several trials in one program, see `xdim_jax.training.pack`."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from xdim_jax.base import bucket, log
from xdim_jax.base.config import Config, load_config
from xdim_jax.base.errors import UserError, first_line
from xdim_jax.base.signals import REQUEUE, StopRequest
from xdim_jax.sweeps import optuna_study as studies
from xdim_jax.sweeps import worker
from xdim_jax.sweeps.space import overrides_of
from xdim_jax.training.pack import Member, Pack


@dataclasses.dataclass
class _ActiveTrial:
    """A trial that this worker has claimed.

    Attributes:
        trial: The trial.
        config: Its config.
        resources: Context managers that are closed when the trial ends: its heartbeat and, if its workdir is in a
            bucket, the synchronisation of the workdir.
        member: Its run in the pack; None while it waits for a slot.
        reported: Number of validations that have been reported to the study.
        checked_at: Time of the last check whether another worker has taken over the trial.
    """

    trial: Any
    config: Config
    resources: contextlib.ExitStack
    member: Member | None = None
    reported: int = 0
    checked_at: float = dataclasses.field(default_factory=time.monotonic)


class PackedWorker:
    """A worker that trains up to ``slots`` trials of a study concurrently.

    When a slot becomes empty, the next trial is put into it. A trial with another program waits until the pack is
    empty; then a new pack compiles its program.

    Args:
        study: Study, see `xdim_jax.sweeps.optuna_study.open_study`.
        job: Settings of the trials.
        stop: Record of received signals; it is checked after every step.
        slots: Number of slots of the pack.
        layout: Layout of the pack, one of `xdim_jax.training.pack.LAYOUTS`.
        heartbeat: Seconds between two heartbeats.
        grace: Seconds after which a worker without a heartbeat counts as dead.
    """

    def __init__(
        self,
        study: Any,
        job: worker.Job,
        stop: StopRequest,
        *,
        slots: int,
        layout: str,
        heartbeat: float = studies.HEARTBEAT_SECONDS,
        grace: float = studies.GRACE_SECONDS,
    ):
        self._study, self._job, self._stop = study, job, stop
        self._slots, self._layout, self._heartbeat, self._grace = slots, layout, heartbeat, grace
        self._pack: Pack | None = None
        self._trials: list[_ActiveTrial] = []
        self._next_claim = 0.0  # no trial is claimed before this time
        self._failures: list[str] = []  # errors of the last trials in a row that failed before their first step
        self._able = False  # True if a trial has been trained

    def run(self, *, wait: bool = True) -> int:
        """Train trials until all trials of the study have ended.

        Args:
            wait: See `xdim_jax.sweeps.worker.run_worker`.

        Returns:
            The exit status.

        Raises:
            UserError: Several trials in a row have failed before their first step, so this machine probably cannot
                train.
        """
        try:
            while True:
                self._fill_slots()
                if self._pack is not None and any(active.member for active in self._trials):
                    self._step(self._pack)  # after a signal, this step also saves a checkpoint
                elif self._stop.signal or not (wait and self._wait_for_others()):
                    break
                else:
                    self._next_claim = 0.0
        finally:
            for active in list(self._trials):
                # a negative status, as of a killed process, can be resumed, but counts as an attempt
                self._finish(active, REQUEUE if self._stop.signal else -1)
        return self._stop.status if self._stop.signal else 0

    def _wait_for_others(self) -> bool:
        """Return False if all trials have ended; otherwise wait a little, and return True."""

        def wait() -> bool:
            return worker.wait_for_others(self._study, self._stop, seconds=min(self._heartbeat, 2.0))

        try:
            return studies.retry(wait, self._stop, self._heartbeat)
        except studies.storage_errors():  # after a signal
            return False

    def _fill_slots(self) -> None:
        """Claim trials and put them into empty slots, until there is no empty slot or no trial to claim."""
        while not self._stop.signal:
            if self._failures and not self._able:
                worker.check_failures(len(self._failures), self._failures[-1])
            active = next((a for a in self._trials if a.member is None), None)
            if active is None:
                if (self._pack is not None and not self._pack.free) or time.monotonic() < self._next_claim:
                    return
                trial = self._claim()
                if trial is None:
                    self._next_claim = time.monotonic() + self._heartbeat
                    return
                active = self._open(trial)
                if active is None:
                    return
            with self._fail_on_user_error(active):
                if self._pack is None or not self._pack.fits(active.config):
                    if len(self._trials) > 1:  # the pack still trains trials with another program
                        return
                    self._pack = Pack(active.config, self._slots, self._layout, self._stop)
                address = worker.trial_address(self._job.root, studies.origin_of(active.trial))
                workdir = active.resources.enter_context(bucket.workdir(address))
                active.member = self._pack.add(active.config, workdir)

    def _claim(self) -> Any | None:
        """Claim a trial. If the study cannot be reached: return None if trials are being trained, else try again."""

        def claim() -> Any | None:
            worker.requeue_dead_trials(self._study, self._grace)
            return studies.claim_trial(self._study, self._job.trials)

        training = any(active.member for active in self._trials)
        try:
            return claim() if training else studies.retry(claim, self._stop, self._heartbeat)
        except studies.storage_errors() as error:  # e.g. the database restarts
            log.warn(f"the study cannot be reached ({first_line(error)}); trials are claimed later")
            return None

    def _open(self, trial: Any) -> _ActiveTrial | None:
        """Start the heartbeat of a claimed trial, and sample its parameters.

        Returns:
            The trial; None if a signal arrived while the study could not be reached. Another worker will resume it.
        """
        resources = contextlib.ExitStack()
        resources.enter_context(studies.Heartbeat(trial, self._heartbeat))
        try:
            studies.retry(lambda: worker.suggest_parameters(trial, self._job), self._stop, self._heartbeat)
        except studies.storage_errors():
            resources.close()
            if not self._stop.signal:
                raise
            return None
        config = load_config(self._job.config, [*self._job.overrides, *overrides_of(trial.params)])
        active = _ActiveTrial(trial, config, resources)
        self._trials.append(active)
        return active

    def _step(self, pack: Pack) -> None:
        """Compute one step of all trials in the pack, and finish those that have ended."""
        try:
            pack.step()
        except Exception as error:  # the program failed, e.g. because memory was exhausted, and with it all its trials
            text = f"{type(error).__name__}: {str(error).strip()[:500]}"
            before = self._failures
            for active in [a for a in self._trials if a.member]:
                self._finish(active, 1, error=text)
            self._failures = [*before, f"failed: {text}"]  # one failure, however many trials the program had
            self._pack = None
            log.warn(f"a pack of {pack.slots} trials (layout {pack.layout}) failed: {text}")
            return
        for active in [a for a in self._trials if a.member]:
            self._after_step(active)

    def _after_step(self, active: _ActiveTrial) -> None:
        """Report new validations of a trial, and finish it if it has ended, was pruned, or was taken over."""
        member = active.member
        assert member is not None
        pruned, taken_over, run = False, False, member.opened.run
        try:
            if member.controller.steps_done % run.per_epoch == 0 or not member.running:
                before = active.reported
                active.reported = worker.report_validations(active.trial, run.workdir, before)
                pruned = active.reported > before and member.running and active.trial.should_prune()
            if time.monotonic() - active.checked_at > self._heartbeat:
                active.checked_at = time.monotonic()
                taken_over = not studies.is_running(self._study, active.trial)
        except studies.storage_errors() as error:  # e.g. the database restarts: training continues
            log.warn(f"the study cannot be reached ({first_line(error)}); the validations are reported later")
        if member.error:
            self._finish(active, 2, error=member.error)
        elif pruned or taken_over or not member.running:
            # after a signal, the last validation may be missing, so the trial is not complete even after its last step
            interrupted = pruned or taken_over or self._stop.signal
            self._finish(active, REQUEUE if interrupted else 0, pruned=pruned)

    @contextlib.contextmanager
    def _fail_on_user_error(self, active: _ActiveTrial) -> Iterator[None]:
        """Record the trial as failed, and let the worker continue, if the block raises UserError."""
        try:
            yield
        except UserError as error:
            self._finish(active, 2, error=str(error))

    def _finish(self, active: _ActiveTrial, status: int, *, pruned: bool = False, error: str = "") -> None:
        """Remove a trial from the pack, and store its result in the study."""
        self._trials.remove(active)
        self._next_claim = 0.0
        if active.member is not None and self._pack is not None:
            active.member.error = active.member.error or error
            try:
                self._pack.remove(active.member)
            except UserError as failure:  # its last checkpoint cannot be written
                status, error = status or 2, error or str(failure)
        try:
            active.resources.close()
        except UserError as failure:  # its workdir cannot be copied into the bucket
            status, error = status or 2, error or str(failure)
        workdir = worker.local_workdir(self._job.root, studies.origin_of(active.trial))

        def record() -> str:
            return worker.record_result(self._study, active.trial, workdir, status, pruned=pruned, error=error)

        try:
            failed = studies.retry(record, self._stop, self._heartbeat)
            started = active.member is not None and active.member.controller.steps_done > 0
            self._able = self._able or started
            self._failures = [*self._failures, failed] if failed and not started else []
        except studies.storage_errors() as failure:  # after a signal
            log.warn(f"{workdir}: the result could not be stored ({first_line(failure)}); a worker will resume it")

"""Searches a space of configs; run again, or on other machines too, the same command joins in as one more worker.

Every trial is a run of xdim_jax.train in <workdir>/trial<number>, which evaluate, predict and report understand. Its
score is the best validation Dice. The trial of a worker that dies goes on elsewhere, from its last checkpoint.

The space is a Python file with a function suggest(trial) of optuna's suggest_* calls on config paths:

    def suggest(trial):
        trial.suggest_float("optim.schedule.peak", 1e-4, 3e-3, log=True)
        trial.suggest_categorical("model.activation", ["relu", "silu"])
"""

from pathlib import Path

from xdim_jax.base import bucket
from xdim_jax.base.errors import UserError


def add_study_arguments(parser: object) -> None:
    """Where a study is; the same in both commands."""
    add = parser.add_argument  # pyright: ignore[reportAttributeAccessIssue]
    add("--study", default="sweep", metavar="NAME", help="name of the study in its storage; default: %(default)s")
    add(
        "--storage",
        default="",
        metavar="PATH|URL",
        help="a journal file, sqlite:///<path> or postgresql://...; default: <workdir>/study.journal",
    )


def storage_of(options: object) -> str:
    """What --storage says, or its default."""
    storage, workdir = options.storage, options.workdir  # pyright: ignore[reportAttributeAccessIssue]
    if not storage and bucket.is_address(workdir):
        raise UserError(
            f"--workdir={workdir}: a study does not fit into a bucket; give --storage=postgresql://..., or the path of "
            "a journal file that all workers see"
        )
    return storage or str(Path(workdir) / "study.journal")

"""Data sets on disk: write phantoms in a challenge's real layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from xdim_jax import cli, log
from xdim_jax.data import brats, phantom
from xdim_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """The command line, see ``--help``."""
    parser = cli.make_parser("xdim_jax.data", __doc__ or "", "exit status: 0 done, 2 unusable input")
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("phantom", help="write synthetic cases", description=phantom.__doc__)
    write.add_argument("--dataset", choices=["brats"], required=True)
    write.add_argument("--root", type=Path, required=True, help="folder for the case folders")
    write.add_argument("--cases", type=int, default=10, help="how many (default %(default)s)")
    write.add_argument("--first", type=int, default=0, help="number of the first (default %(default)s)")
    write.add_argument("--seed", type=int, default=0)
    write.add_argument("--shape", default="240,240,155", metavar="X,Y,Z", help="voxels (default %(default)s)")
    write.add_argument("--convention", choices=sorted(brats.CONVENTIONS), default="brats2021")
    options = parser.parse_args(argv)
    try:
        x, y, z = (int(n) for n in options.shape.split(","))
    except ValueError as error:
        raise UserError(f"--shape={options.shape}: expected three numbers, X,Y,Z") from error
    phantom.write_brats(
        options.root,
        cases=options.cases,
        first=options.first,
        convention=brats.get_convention(options.convention),
        shape=(x, y, z),
        seed=options.seed,
        progress=log.say,
    )
    return 0


def command() -> NoReturn:
    """The console entry point."""
    cli.run(main)


if __name__ == "__main__":
    command()

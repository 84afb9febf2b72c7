"""Console scripts. Each sets up the process before the large imports."""

from typing import NoReturn

from xdim_jax.base.huge_pages import prefer_huge_pages


def train() -> NoReturn:
    """The console entry point of ``xdim-train``."""
    prefer_huge_pages()
    from xdim_jax.train import command

    command()


def predict() -> NoReturn:
    """The console entry point of ``xdim-predict``."""
    prefer_huge_pages()
    from xdim_jax.predict import command

    command()


def sweep() -> NoReturn:
    """The console entry point of ``xdim-sweep``."""
    prefer_huge_pages()
    from xdim_jax.sweep import command

    command()


def doctor() -> NoReturn:
    """The console entry point of ``xdim-doctor``."""
    prefer_huge_pages()
    from xdim_jax.doctor import command

    command()

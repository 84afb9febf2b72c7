"""Console scripts that must set up the process before they import JAX, see `xdim_jax.base.huge_pages`."""

from typing import NoReturn

from xdim_jax.base.huge_pages import prefer_huge_pages


def fit() -> NoReturn:
    """Run the console script ``xdim-fit``."""
    prefer_huge_pages()
    from xdim_jax.fit import command

    command()


def train() -> NoReturn:
    """Run the console script ``xdim-train``."""
    prefer_huge_pages()
    from xdim_jax.train import command

    command()


def predict() -> NoReturn:
    """Run the console script ``xdim-predict``."""
    prefer_huge_pages()
    from xdim_jax.predict import command

    command()


def sweep() -> NoReturn:
    """Run the console script ``xdim-sweep``."""
    prefer_huge_pages()
    from xdim_jax.sweep import command

    command()


def study() -> NoReturn:
    """Run the console script ``xdim-study``."""
    prefer_huge_pages()
    from xdim_jax.study import command

    command()


def doctor() -> NoReturn:
    """Run the console script ``xdim-doctor``."""
    prefer_huge_pages()
    from xdim_jax.doctor import command

    command()

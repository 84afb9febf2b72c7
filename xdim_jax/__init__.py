"""Cross-dimensional transfer learning for medical image segmentation (Messaoudi et al. 2023) in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xdim_jax.inference.model import Model, load_model
    from xdim_jax.inference.predictor import Predictor

__version__ = "0.1.0"
__all__ = ["Model", "Predictor", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    """Import names that need JAX only when they are first used, so that other modules can be imported without it."""
    if name == "Predictor":
        from xdim_jax.inference import predictor

        return predictor.Predictor
    if name in ("Model", "load_model"):
        from xdim_jax.inference import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

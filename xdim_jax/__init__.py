"""Cross-dimensional transfer learning for medical image segmentation (Messaoudi et al. 2023) in JAX and Flax."""

__version__ = "0.1.0"

"""Data sets on disk, preparation, and the input pipeline. Nothing here imports jax."""

"""Data sets on disk, their preparation, and the input pipeline. This folder does not import JAX."""

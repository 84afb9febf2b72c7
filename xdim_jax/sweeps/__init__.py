"""Hyperparameter sweeps: search spaces, a study that workers share, and a report on the study."""

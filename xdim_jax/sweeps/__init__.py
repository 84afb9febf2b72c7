"""Hyperparameter sweeps: search spaces, studies with several workers, and reports."""

"""Modules that all other packages use: errors, files, configs, signals and log lines. None of them imports JAX."""

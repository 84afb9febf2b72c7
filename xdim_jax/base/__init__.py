"""What everything else is built on: errors, files, configs, terminal lines. Nothing here imports jax."""

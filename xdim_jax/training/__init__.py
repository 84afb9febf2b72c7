"""Training: check of the config, data, loss, optimiser, training step, and training loop."""

"""Training: configs checked, data, loss, optimiser, one step, the loop."""

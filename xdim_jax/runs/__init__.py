"""The workdir of a run: files, records, training state, checkpoints."""

"""The layouts of data sets on disk."""

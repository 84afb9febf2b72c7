"""Choosing a recipe for a data set, from its fingerprint and the machine."""

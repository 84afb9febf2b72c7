"""Searches over configs: a space, a study that any number of workers share, and the page that shows it."""

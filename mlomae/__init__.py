"""Masked autoencoders whose masks are learned for the downstream task by multilevel optimisation."""

__version__ = "0.1.0"

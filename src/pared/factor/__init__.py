"""Fewer parameters per layer: low rank."""

from pared.registry import family

__getattr__, __dir__ = family(__name__)

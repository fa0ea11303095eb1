"""A compressed network learns from the original."""

from pared.registry import family

__getattr__, __dir__ = family(__name__)

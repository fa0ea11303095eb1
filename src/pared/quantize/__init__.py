"""Fewer bits per weight."""

from pared.registry import family

__getattr__, __dir__ = family(__name__)

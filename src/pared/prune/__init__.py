"""Remove what is not needed: weights, blocks, channels."""

from pared.registry import family

__getattr__, __dir__ = family(__name__)

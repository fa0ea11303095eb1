"""The `.pared` file: a model's edits, coded tensors and program, written and read bit for bit, without running anything."""

from pared.artifact.checkpoint import pack, unpack
from pared.artifact.inspect import describe, inspect
from pared.artifact.read import load
from pared.artifact.write import save

__all__ = ["describe", "inspect", "load", "pack", "save", "unpack"]

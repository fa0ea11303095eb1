"""The one training loop: plain torch, resumable bit by bit; under `accelerate launch` the same on many devices."""

from pared.train.history import EpochRecord, History
from pared.train.loop import train

__all__ = ["EpochRecord", "History", "train"]

"""What happened in a training, epoch by epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Args:
        epoch: counted from 1.
        loss: mean of the batches' losses.
        score: of the validation after the epoch; None without one.
        learning_rate: at the epoch's last step.
        annealed: whether every technique had reached its final state, so that the epoch could be the best.
        seconds: training and validation.
    """

    epoch: int
    loss: float
    score: float | None
    learning_rate: float
    annealed: bool
    seconds: float


@dataclass
class History:
    """A training's course.

    Args:
        epochs: what was done, in order; the epochs of earlier, interrupted runs included.
        start_score: validation score before the first step, where the untrained weights could be kept; else None.
        best_epoch: the epoch whose weights were kept, 0 for the weights before training; None if the last were kept.
        best_score: the score of those weights.
        learning_rate: the peak.
        ended: "all epochs", "patience" or "time".
        seconds: of all epochs.
    """

    epochs: list[EpochRecord] = field(default_factory=list)
    start_score: float | None = None
    best_epoch: int | None = None
    best_score: float | None = None
    learning_rate: float = 0.0
    ended: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> History:
        return cls(**{**facts, "epochs": [EpochRecord(**epoch) for epoch in facts["epochs"]]})

"""`pared demo`: train a small net on scikit-learn's digits, compress it, write the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pared import sources
from pared.pipeline import Result, compress
from pared.place import Progress
from pared.task import Task

EPOCHS = 25


class DigitsNet(nn.Module):
    """A small residual convolutional network for 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.widen = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.hidden = nn.Linear(64 * 4 * 4, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.block(x)
        x = torch.relu(self.widen(x)).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


def trained(task: Task, seed: int, progress: Progress) -> nn.Module:
    """A DigitsNet trained with plain torch, as a user's own would be."""
    torch.manual_seed(seed)
    model = DigitsNet()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
    for epoch in range(1, EPOCHS + 1):
        for batch in task.train:
            optimiser.zero_grad()
            task.batch_loss(task.outputs(model, batch), batch).backward()
            optimiser.step()
        schedule.step()
        progress({"doing": "training a small net on digits", "done": epoch, "total": EPOCHS})
    return model.eval()


def run(out: Path, seed: int, progress: Any) -> Result:
    """Train, compress to a twentieth, report."""
    task = sources.data("digits", seed=seed).task
    model = trained(task, seed, progress)
    return compress(
        model, task, size="20x", max_drop=1.0, out=out, seed=seed, progress=progress, command=f"pared demo --out {out}"
    )

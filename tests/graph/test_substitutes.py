"""Embedding bags are traced in operators that check their indices, and give what torch gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pared.errors import ArtifactError
from pared.graph import trace
from pared.graph.substitutes import bags

WEIGHT = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
ROWS = torch.tensor([[1, 3, 3], [3, 3, 3], [9, 0, 2]])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3, -7])
@pytest.mark.parametrize(
    ("indices", "more"),
    [
        (ROWS, {}),
        (ROWS.flatten(), {"offsets": torch.tensor([0, 0, 4, 9])}),
        (ROWS.flatten(), {"offsets": torch.tensor([0, 2, 9]), "include_last_offset": True}),
    ],
)
def test_bags_equal_torch(mode: str, padding_idx: int | None, indices: torch.Tensor, more: dict[str, Any]) -> None:
    expected = F.embedding_bag(indices, WEIGHT, mode=mode, padding_idx=padding_idx, **more)
    torch.testing.assert_close(bags(indices, WEIGHT, mode=mode, padding_idx=padding_idx, **more), expected)


def test_weights_of_samples_are_used() -> None:
    weights = torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    expected = F.embedding_bag(ROWS, WEIGHT, mode="sum", per_sample_weights=weights)
    torch.testing.assert_close(bags(ROWS, WEIGHT, mode="sum", per_sample_weights=weights), expected)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(10, 4, mode="mean")
        self.head = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.words(ids))
        return out


def test_the_program_has_a_free_batch_and_refuses_an_index_outside_the_table() -> None:
    model = Bag().eval()
    program = trace(model, (ROWS,))
    run = program.module(program.root(dict(model.named_parameters())))
    ids = torch.randint(0, 10, (7, 3), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(run(ids), model(ids))
    with pytest.raises(ArtifactError, match="index out of range"):
        run(ids + 10)

"""Every test starts from the same seeds, on one thread, and none talks to a hub."""

import os
import random

import numpy as np
import pytest
import torch

from pared.sources.torchvision_schemas import declare_missing_schemas

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
declare_missing_schemas()  # so that tests may import timm and transformers themselves


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

"""One process, or many under `accelerate launch`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from pared.errors import InputError, MissingExtra
from pared.task import Batch


class Alone:
    """This process is the only one."""

    count = 1
    is_main = True

    def prepare(self, model: nn.Module, teachers: Iterable[nn.Module]) -> nn.Module:
        return model

    def share(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        return loader

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def agree(self, value: float) -> float:
        return value

    def equalise_(self, tensors: Iterable[Tensor]) -> None:
        """Nobody to agree with."""

    def wait(self) -> None:
        """Nobody to wait for."""


class Launched:
    """One of the processes of `accelerate launch`, under distributed data parallel.

    Every process iterates the whole loader in the same order and takes every count-th batch, so any iterable will do.
    """

    def __init__(self) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedType

        self._accelerator = Accelerator()
        kind = self._accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise InputError(f"training under accelerate must be data parallel, got {kind.value}; choose MULTI_GPU")
        if self._accelerator.mixed_precision not in ("no", "bf16"):
            found = self._accelerator.mixed_precision
            raise InputError(f'mixed precision under accelerate must be "no" or "bf16", got "{found}"')
        self.count = self._accelerator.num_processes
        self.is_main = self._accelerator.is_main_process

    def prepare(self, model: nn.Module, teachers: Iterable[nn.Module]) -> nn.Module:
        for teacher in teachers:
            teacher.to(self._accelerator.device)
        return self._accelerator.prepare(model)

    def share(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        return _Share(loader, self._accelerator.process_index, self.count)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def agree(self, value: float) -> float:
        """The main process's value."""
        held = torch.tensor([value], dtype=torch.float64, device=self._accelerator.device)
        self.equalise_([held])
        return float(held)

    def equalise_(self, tensors: Iterable[Tensor]) -> None:
        """Give the tensors the main process's values."""
        from accelerate.utils import broadcast

        if self.count > 1:
            for tensor in tensors:
                tensor.data.copy_(broadcast(tensor.data.clone()))

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


class _Share:
    def __init__(self, loader: Iterable[Batch], index: int, count: int) -> None:
        self.loader = loader
        self.index = index
        self.count = count

    def __iter__(self) -> Iterator[Batch]:
        """Every count-th batch; what is left over at the end is dropped, so that all processes take as many steps."""
        batches = iter(self.loader)
        while len(group := list(islice(batches, self.count))) == self.count:
            yield group[self.index]


def processes() -> Alone | Launched:
    """How this process was started."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return Alone()
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtra("accelerate", "train")
    return Launched()

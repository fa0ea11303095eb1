"""The state of a training in one file: safetensors, JSON in its header, a digest; replaced in one step."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pared.errors import InputError

VERSION = 1
FILE = "training.safetensors"


class Checkpoint:
    """A training's state in a folder.

    Args:
        folder: made when it is missing.
        identity: what has to be the same for the training to be the same one; JSON values by name.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.path = Path(folder) / FILE
        self.identity = json.loads(json.dumps(identity))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts of the last save, or None if there is none.

        Raises:
            InputError: the file is damaged, or of another training.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                header = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = header.pop("digest")
            state = json.loads(header["state"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise self._damaged() from error
        if digest != digest_of(tensors, header["state"]):
            raise self._damaged()
        if state["version"] != VERSION:
            raise InputError(
                f"{self.path} must have version {VERSION}, got {state['version']}; use the pared that wrote it, or "
                "delete it to start again"
            )
        if state["identity"] != self.identity:
            other = state["identity"]
            keys = [key for key in {**other, **self.identity} if other.get(key) != self.identity.get(key)]
            raise InputError(
                f"{self.path} belongs to another training: {keys[0].replace('_', ' ')} is {other.get(keys[0])} there "
                f"and {self.identity.get(keys[0])} here; use the settings of that run, or another folder"
            )
        return tensors, state["facts"]

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replace the file. Until the last moment the old one stays whole.

        Raises:
            InputError: it cannot be written.
        """
        state = json.dumps({"version": VERSION, "identity": self.identity, "facts": facts})
        held = {name: _alone(tensor) for name, tensor in tensors.items()}
        fresh = self.path.with_suffix(".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(held, fresh, {"state": state, "digest": digest_of(held, state)})
            with open(fresh, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(fresh, self.path)
            _sync_folder(self.path.parent)
        except (OSError, SafetensorError) as error:
            if fresh.is_file():
                fresh.unlink()
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"{self.path} could not be written: {reason}; make room, or choose another folder"
            ) from error

    def _damaged(self) -> InputError:
        return InputError(
            f"{self.path} must be a whole checkpoint, but it is damaged; delete it to start the training again"
        )


def digest_of(tensors: dict[str, Tensor], text: str = "") -> str:
    """The sha256 of names, types, shapes, values and a text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in memory that it shares with no other, as the format wants it."""
    held = tensor.detach().cpu().contiguous()
    return held if held.untyped_storage().nbytes() == held.nbytes else held.clone()


def _sync_folder(folder: Path) -> None:
    """Make the new name last; on systems that cannot open a folder the rename itself has to do."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The frame of a .pared file: a safetensors file with one entry of bytes; written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pared.errors import ArtifactError, InputError

ENTRY = "pared"
LARGEST_HEADER = 1 << 16
_LENGTH_BYTES = 8


def wrap(body: Sequence[bytes | memoryview]) -> memoryview:
    """The bytes of a safetensors file that holds the parts of the body as its one tensor, of type U8."""
    length = sum(map(len, body))
    entry = {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}
    header = json.dumps({ENTRY: entry}, separators=(",", ":")).encode()
    parts = [len(header).to_bytes(_LENGTH_BYTES, "little"), header, *body]
    file = np.empty(sum(map(len, parts)), np.uint8).data  # not joined: numpy gets large pages of memory, which is quicker
    start = 0
    for part in parts:
        file[start : start + len(part)] = part
        start += len(part)
    return file


def unwrap(file: memoryview) -> memoryview:
    """The body of a file. Text in `__metadata__`, which other tools may add, is passed over.

    Raises:
        ArtifactError: the bytes are not one whole .pared file.
    """
    if len(file) < _LENGTH_BYTES:
        raise ArtifactError(f"a .pared file must have more than {_LENGTH_BYTES} bytes, got {len(file)}: it is cut off")
    length = int.from_bytes(file[:_LENGTH_BYTES], "little")
    if not 2 <= length <= min(LARGEST_HEADER, len(file) - _LENGTH_BYTES):
        raise ArtifactError("this is not a .pared file, or it is cut off: the length of its header is wrong")
    try:
        header = json.loads(bytes(file[_LENGTH_BYTES : _LENGTH_BYTES + length]), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ArtifactError("this is not a .pared file, or it is damaged: its header is not JSON") from error
    body = file[_LENGTH_BYTES + length :]
    if not isinstance(header, dict) or set(header) - {"__metadata__"} != {ENTRY}:
        raise ArtifactError(f"this is not a .pared file: its header must name one entry, {ENTRY!r}")
    entry = header[ENTRY]
    expected = {"dtype": "U8", "shape": [len(body)], "data_offsets": [0, len(body)]}
    if entry != expected:
        raise ArtifactError(f"the header must describe {len(body)} bytes, the file holds as many; it is cut off or damaged")
    return body


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def read(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a file; InputError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} must be a file that can be read: {error.strerror or error}; check the path") from error


def write(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Put the data at the path in one step: whatever goes wrong, what was there before stays whole.

    Raises:
        InputError: the folder does not exist, the disk is full, or the like.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"{path} could not be written ({len(data)} bytes): {reason}; what was there before is unchanged"
        ) from error
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the renaming last through a power cut; some file systems cannot, and the file is whole without it."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

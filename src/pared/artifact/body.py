"""The bytes inside the frame.

version       1 byte
seal          16 bytes    sha256, cut off, of everything after it
digest        16 bytes    of the tensors, see `pared.artifact.tensors.digest`
method        1 byte      how the manifest is compressed
size, length  varints     of the manifest before and after compression
manifest
streams       varints     for every stream of the data: length * number of coders + number of the coder
data          the streams, one after the other
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from pared.artifact.compression import pack, unpack
from pared.errors import ArtifactError

VERSION = 1
DIGEST_BYTES = 16
_HEAD_BYTES = 1 + 2 * DIGEST_BYTES + 1
_LONGEST_VARINT = 10


@dataclass
class Body:
    """The parts of a body.

    Args:
        digest: of the tensors.
        manifest: JSON.
        streams: number of the coder and payload of every coded array.
        manifest_bytes: of the manifest in the file.
    """

    digest: bytes
    manifest: bytes
    streams: Sequence[tuple[int, bytes | memoryview]]
    manifest_bytes: int = 0

    def parts(self, n_coders: int) -> list[bytes | memoryview]:
        """The bytes, in pieces to be put one after the other."""
        method, packed = pack(self.manifest)
        lengths = b"".join(varint(len(payload) * n_coders + coder) for coder, payload in self.streams)
        head = b"".join([self.digest, bytes([method]), varint(len(self.manifest)), varint(len(packed)), packed, lengths])
        sealed = [head, *(payload for _, payload in self.streams)]
        return [bytes([VERSION]) + seal(*sealed), *sealed]


def seal(*sealed: bytes | memoryview) -> bytes:
    over_all = hashlib.sha256()
    for part in sealed:
        over_all.update(part)
    return over_all.digest()[:DIGEST_BYTES]


class Reader:
    """Reads a body; every step is bounded by the bytes that are there.

    Args:
        body: all its bytes.
        is_own: it was sealed a moment ago, in the same memory.

    Raises:
        ArtifactError: the seal does not fit, the version is not known, or the body ends too early.
    """

    def __init__(self, body: memoryview, is_own: bool = False) -> None:
        if len(body) and body[0] != VERSION:
            raise ArtifactError(f"this pared reads files of version {VERSION}, found version {body[0]}; load with a newer pared")
        if len(body) < _HEAD_BYTES:
            raise ArtifactError(f"a .pared file must hold {_HEAD_BYTES} bytes or more, got {len(body)}: it is cut off")
        sealed = body[1 + DIGEST_BYTES :]
        if not is_own and seal(sealed) != bytes(body[1 : 1 + DIGEST_BYTES]):
            raise ArtifactError("the file was altered or damaged: its sha256 is another one than when it was saved")
        self._body = body
        self._position = _HEAD_BYTES
        self.digest = bytes(sealed[:DIGEST_BYTES])
        self.size, self.manifest_bytes = self._varint(), self._varint()
        self.manifest = unpack(int(body[_HEAD_BYTES - 1]), bytes(self._take(self.manifest_bytes)), self.size)

    def streams(self, n_streams: int, n_coders: int) -> list[tuple[int, memoryview]]:
        """Number of the coder and payload of each stream; together they must be all that is left."""
        if n_streams > len(self._body) - self._position:
            raise ArtifactError(f"the file must hold {n_streams} coded tensors, which do not fit into it; it is damaged")
        if n_streams and not n_coders:
            raise ArtifactError("a file with tensors must name their coders; it is damaged")
        heads = [divmod(self._varint(), n_coders) for _ in range(n_streams)]
        streams = [(coder, self._take(length)) for length, coder in heads]
        if self._position != len(self._body):
            raise ArtifactError(f"{len(self._body) - self._position} bytes follow the last tensor; the file is damaged")
        return streams

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 7 * _LONGEST_VARINT, 7):
            byte = self._take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ArtifactError("a length in the file is too large; it is damaged")

    def _take(self, length: int) -> memoryview:
        start = self._position
        if length > len(self._body) - start:
            raise ArtifactError("the file ends too early; it is cut off or damaged")
        self._position = start + length
        return self._body[start : self._position]


def varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first; the highest bit says that more follow."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)

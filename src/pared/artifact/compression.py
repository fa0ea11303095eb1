"""The manifest as few bytes: deflate primed with words that manifests are made of, or LZMA, whichever is smaller."""

from __future__ import annotations

import lzma
import zlib

from pared.artifact.words import WORDS
from pared.errors import ArtifactError

LARGEST_RATIO = 200
"""How many times its size a compressed manifest may grow."""

_FREE_BYTES = 1 << 16
_STORED, _DEFLATE, _LZMA = 0, 1, 2
_LZMA_MODELS = tuple((lc, lp, pb) for pb in range(5) for lp in range(5) for lc in range(5 - lp))
_TRIED = ((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0))


def pack(text: bytes) -> tuple[int, bytes]:
    """The method, a number below 256, and the bytes."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, WORDS)
    tried = [(_STORED, text), (_DEFLATE, deflate.compress(text) + deflate.flush())]
    for model in _TRIED:
        method = _LZMA + _LZMA_MODELS.index(model)
        tried.append((method, lzma.compress(text, lzma.FORMAT_RAW, filters=_filters(method))))
    return min(tried, key=lambda pair: len(pair[1]))


def unpack(method: int, data: bytes, size: int) -> bytes:
    """The text of exactly `size` bytes; ArtifactError if the data gives another one. Never holds more than `size` bytes."""
    if size > LARGEST_RATIO * len(data) + _FREE_BYTES:
        raise ArtifactError(f"{len(data)} bytes of a manifest must not become {size}; the file is damaged")
    try:
        if method == _STORED:
            text = data
        elif method == _DEFLATE:
            inflate = zlib.decompressobj(-15, WORDS)
            text = inflate.decompress(data, size + 1)
            if not inflate.eof or inflate.unused_data:
                raise ArtifactError("the compressed manifest does not end where it should; the file is damaged")
        elif method < _LZMA + len(_LZMA_MODELS):
            text = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(method)).decompress(data, size + 1)
        else:
            raise ArtifactError(f"the manifest is compressed by method {method}, which is not known; load with a newer pared")
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise ArtifactError(f"the manifest cannot be decompressed ({error}); the file is damaged") from error
    if len(text) != size:
        raise ArtifactError(f"the manifest must have {size} bytes, found {len(text)} or more; the file is damaged")
    return text


def _filters(method: int) -> list[dict[str, int]]:
    lc, lp, pb = _LZMA_MODELS[method - _LZMA]
    return [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": lc, "lp": lp, "pb": pb, "nice_len": 273, "mf": lzma.MF_BT4}]

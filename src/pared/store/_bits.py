"""Reading and writing the bit fields in front of a coded tensor; every read is bounded by the payload."""

from __future__ import annotations

from pared.errors import StoreError

_LONGEST_GAMMA = 70  # bits: a zigzagged int64 needs 65


def damaged(rule: str) -> StoreError:
    """The error to raise for bytes that break a rule, which says what must hold and what was found."""
    return StoreError(f"{rule}; the payload is damaged, or of another shape or type")


class BitWriter:
    """Collects bit fields, most significant bit first."""

    def __init__(self) -> None:
        self._value = 0
        self._pending = 0
        self._done = bytearray()

    def write(self, value: int, width: int) -> None:
        self._value = (self._value << width) | value
        self._pending += width
        if self._pending >= 512:
            rest = self._pending % 8
            self._done += (self._value >> rest).to_bytes(self._pending // 8, "big")
            self._value &= (1 << rest) - 1
            self._pending = rest

    def write_gamma(self, value: int, order: int = 0) -> None:
        """Exponential Golomb code of value >= 0."""
        self.write(*gamma_field(value, order))

    def write_signed(self, value: int, order: int = 0) -> None:
        self.write_gamma(zigzag(value), order)

    @property
    def n_bits(self) -> int:
        return 8 * len(self._done) + self._pending

    def to_bytes(self) -> bytes:
        """Everything written, padded with zero bits to a whole byte."""
        padding = -self._pending % 8
        tail = (self._value << padding).to_bytes((self._pending + padding) // 8, "big")
        return bytes(self._done) + tail


class BitReader:
    """Reads what BitWriter wrote; raises StoreError at the end of the payload, never reads past it."""

    def __init__(self, payload: bytes | memoryview) -> None:
        self._payload = payload
        self._position = 0
        self._end = 8 * len(payload)

    def read(self, width: int) -> int:
        start, stop = self._position, self._position + width
        if stop > self._end:
            raise damaged(f"a payload must have {(stop + 7) // 8} bytes or more, got {len(self._payload)}")
        self._position = stop
        chunk = int.from_bytes(self._payload[start // 8 : (stop + 7) // 8], "big")
        return (chunk >> (-stop % 8)) & ((1 << width) - 1)

    def read_gamma(self, order: int = 0, limit: int | None = None) -> int:
        """Exponential Golomb code; a value above limit is damage."""
        zeros = 0
        while not self.read(1):
            zeros += 1
            if zeros > _LONGEST_GAMMA:
                raise damaged(f"a number in the header must have at most {_LONGEST_GAMMA} bits")
        value = ((1 << (zeros + order)) | self.read(zeros + order)) - (1 << order)
        if limit is not None and value > limit:
            raise damaged(f"a number in the header must be at most {limit}, got {value}")
        return value

    def read_signed(self, order: int = 0) -> int:
        folded = self.read_gamma(order)
        return (folded >> 1) ^ -(folded & 1)

    def rest(self) -> memoryview:
        """The whole bytes after the last field read; the padding before them must be zero."""
        if self.read(-self._position % 8):
            raise damaged("padding bits after the header must be zero")
        return memoryview(self._payload)[self._position // 8 :]


def zigzag(value: int) -> int:
    """0, -1, 1, -2, 2, ... to 0, 1, 2, 3, 4, ..."""
    return 2 * value if value >= 0 else -2 * value - 1


def gamma_bits(value: int, order: int = 0) -> int:
    return 2 * (value + (1 << order)).bit_length() - 1 - order


def gamma_field(value: int, order: int = 0) -> tuple[int, int]:
    """The exponential Golomb code of value >= 0 as a bit field (value, width)."""
    return value + (1 << order), gamma_bits(value, order)

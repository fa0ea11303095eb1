"""Numbers as planes of bytes in blocks of 16,384, each as it is, as one value, or by tabled asymmetric numeral systems.

The numbers are turned left by one bit first, so that the highest byte of a float32 or bfloat16 is its exponent, and the
sign joins the incompressible low bits. What is noise in one part of a tensor may be zero in another (rows that were
never trained, or came from a shorter type), and the scale of rows may drift, so every block of every plane has a mode,
and a new table where that saves more than the table takes. The coded blocks of a plane are one stream of bits: four
states take turns and go on from block to block, whatever the table, as all tables have 4,096 slots.

modes         2 bits for every block of plane 0, plane 1, ...: raw, one value, the table so far, a new table
descriptions  in the same order, of blocks that need one: the value (1 byte), or the table
streams       for every plane with coded blocks: length in 32-bit words (4 bytes), bits to skip (1), four states (2 each)
raw           the raw blocks, in the same order
data          the streams, and eight bytes of zeros, which a decoder may read without looking

Paper   Duda 2013, arXiv:1311.2540 (the states); the split is that of Zhang et al. 2025, arXiv:2504.11651.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import NamedTuple

import numpy as np

from pared.store._bits import damaged
from pared.store._compiled import compiled

BLOCK = 1 << 14  # words; a multiple of the number of states
RAW, ONE, SAME, NEW = range(4)
_AT_ONCE = 16  # blocks that are split or merged together: so many that their planes stay in the cache
_PRECISION = 12
_SLOTS = 1 << _PRECISION
_STATES = 4
_STREAM_BYTES = 5 + 2 * _STATES
_SAMPLED = 1024  # of every quarter of a block, by which planes are known for noise
WORTH = 19 / 20  # a block is coded when it takes less than this part of its bytes, as decoding takes time
_SPARE_BYTES = 8  # behind the streams: a round of four symbols reads no further, wherever in them it begins
_INDEX_BYTES = 2  # in front of a table: its first symbol, and how many there are
_KEPT = threading.local()


class Plan(NamedTuple):
    """How words are coded: modes (planes, blocks), values (planes, blocks) of the blocks with one value, the number of
    each block's table among tables (T, 256), which sum to 4,096 and follow each other as they are used; and about how
    many bits all that takes.
    """

    modes: np.ndarray
    values: np.ndarray
    numbers: np.ndarray
    tables: np.ndarray
    bits: float


def plan(words: np.ndarray) -> Plan:
    """words: (n,) of an unsigned type of two bytes or more."""
    n_planes, n_blocks = words.dtype.itemsize, -(-words.size // BLOCK)
    modes = np.zeros((n_planes, n_blocks), np.uint8)
    values = np.zeros((n_planes, n_blocks), np.uint8)
    counts = np.zeros((n_planes, n_blocks, 256), np.int32)
    planes = _scratch(n_planes)
    survey = compiled(_survey)
    for first in range(0, n_blocks, _AT_ONCE):
        part = words[first * BLOCK : (first + _AT_ONCE) * BLOCK]
        compiled(_split)(part, planes)
        for plane in range(n_planes):
            here = (plane, slice(first, first + _AT_ONCE))
            sampled = int(plane < n_planes - 1)
            survey(planes[plane, : part.size], sampled, _information(), counts[here], modes[here], values[here])
    numbers = np.zeros((n_planes, n_blocks), np.int64)
    tables = np.empty((n_planes * n_blocks, 256), np.int64)
    raw = 8 * int(_raw_sizes(modes, words.size).sum())
    n_tables, bits = 0, 2.0 * modes.size + 8 * np.count_nonzero(modes == ONE) + 8 * _SPARE_BYTES
    for plane in range(n_planes):
        before = n_tables
        n_tables, coded = compiled(_group)(counts[plane], modes[plane], _information(), numbers[plane], tables, n_tables)
        bits += coded + 8 * _STREAM_BYTES * (n_tables > before)
    return Plan(modes, values, numbers, tables[:n_tables], bits + raw)


def encode(words: np.ndarray, chosen: Plan) -> memoryview:
    described = bytearray(_packed(chosen.modes))
    for plane, block in np.argwhere((chosen.modes == ONE) | (chosen.modes == NEW)).tolist():
        if chosen.modes[plane, block] == ONE:
            described.append(chosen.values[plane, block])
        else:
            described += _described(chosen.tables[chosen.numbers[plane, block]])
    n_planes, n_blocks = chosen.modes.shape
    rooms = [np.empty(row.sum() * BLOCK * _PRECISION // 32 + 2, np.uint32) for row in chosen.modes >= SAME]
    cursors = [np.array([room.size, 0, 0], np.uint64) for room in rooms]
    states = np.full((n_planes, _STATES), _SLOTS, np.uint64)
    coded = [plane for plane, room in enumerate(rooms) if room.size > 2]
    start = len(described) + _STREAM_BYTES * len(coded)
    raw_sizes = _raw_sizes(chosen.modes, words.size)
    ends = (start + raw_sizes.cumsum()).tolist()
    payload = np.empty(ends[-1] + 4 * sum(rooms[plane].size for plane in coded) + _SPARE_BYTES, np.uint8)
    runs = [_runs(*row) for row in zip(chosen.modes, chosen.numbers, strict=True)]
    planes = _scratch(n_planes)
    ways: dict[int, tuple[np.ndarray, ...]] = {}
    for first in range((n_blocks - 1) // _AT_ONCE * _AT_ONCE, -1, -_AT_ONCE):
        part = words[first * BLOCK : (first + _AT_ONCE) * BLOCK]
        compiled(_split)(part, planes)
        for plane in range(n_planes):
            for begin, end, mode, number in reversed(runs[plane][first // _AT_ONCE]):
                piece = planes[plane, begin * BLOCK : min(end * BLOCK, part.size)]
                if mode == RAW:
                    payload[ends[plane] - piece.size : ends[plane]] = piece
                    ends[plane] -= piece.size
                elif mode != ONE:
                    if number not in ways:
                        ways = {number: compiled(_transitions)(chosen.tables[number])}
                    compiled(_encode)(piece, *ways[number], rooms[plane], cursors[plane], states[plane])
    position = start + int(raw_sizes.sum())
    for plane in coded:
        first, buffer, pending = cursors[plane].tolist()
        if pending:
            first -= 1
            rooms[plane][first] = buffer << (32 - pending) & 0xFFFFFFFF
        stream = rooms[plane][first:]
        described += stream.size.to_bytes(4, "little") + bytes([-pending % 32])
        described += (states[plane] - np.uint64(_SLOTS)).astype("<u2").tobytes()
        payload[position : position + 4 * stream.size] = stream.astype("<u4", copy=False).view(np.uint8)
        position += 4 * stream.size
    payload[:start] = described
    payload[position : position + _SPARE_BYTES] = 0
    return payload[: position + _SPARE_BYTES].data


def decode(payload: memoryview, n: int, dtype: np.dtype) -> np.ndarray:
    """The words (n,) of the unsigned type dtype; StoreError when the payload is none of theirs."""
    reader = _Reader(payload)
    n_planes, n_blocks = dtype.itemsize, -(-n // BLOCK)
    modes = _unpacked(reader.take(-(-n_planes * n_blocks // 4)), n_planes, n_blocks)
    numbers = (modes == NEW).cumsum().reshape(modes.shape) - 1
    tables: list[np.ndarray] = []
    for plane, block in np.argwhere((modes == ONE) | (modes == NEW)).tolist():
        if modes[plane, block] == ONE:
            numbers[plane, block] = reader.take(1)[0]
        else:
            tables.append(_table(reader))
    first_coded = (modes >= SAME).argmax(1)
    if (modes[np.arange(n_planes), first_coded] == SAME).any():
        raise damaged("the first coded block of a plane must bring a table")
    cursors = np.zeros((n_planes, 2), np.uint64)  # where in the data, in bits, and where its end is
    states = np.zeros((n_planes, _STATES), np.uint64)
    n_words = 0
    for plane in np.flatnonzero((modes >= SAME).any(1)).tolist():
        head = reader.take(_STREAM_BYTES)
        states[plane] = np.frombuffer(head[5:], "<u2")
        length = int.from_bytes(head[:4], "little")
        if head[4] >= 32 or states[plane].max() >= _SLOTS:
            raise damaged(f"a stream must skip less than 32 bits and begin in states below {_SLOTS}")
        cursors[plane] = 32 * n_words + head[4], 32 * (n_words + length)
        n_words += length
    raw_sizes = _raw_sizes(modes, n)
    raw = np.frombuffer(reader.take(int(raw_sizes.sum())), np.uint8)
    if reader.left != 4 * n_words + _SPARE_BYTES:
        raise damaged(f"streams of {4 * n_words} bytes, and {_SPARE_BYTES}, must end the payload, got {reader.left} bytes")
    data = np.frombuffer(reader.take(reader.left), np.uint8)
    if data[4 * n_words :].any():
        raise damaged(f"the last {_SPARE_BYTES} bytes must be zeros")
    data.flags.writeable = False  # numba would compile again for what is
    starts = (raw_sizes.cumsum() - raw_sizes).tolist()
    runs = [_runs(*row) for row in zip(modes, numbers, strict=True)]
    words = np.empty(n, dtype)
    planes = _scratch(n_planes)
    slots: dict[int, np.ndarray] = {}
    for first in range(0, n_blocks, _AT_ONCE):
        part = words[first * BLOCK : (first + _AT_ONCE) * BLOCK]
        for plane in range(n_planes):
            for begin, end, mode, number in runs[plane][first // _AT_ONCE]:
                piece = planes[plane, begin * BLOCK : min(end * BLOCK, part.size)]
                if mode == RAW:
                    piece[:] = raw[starts[plane] : starts[plane] + piece.size]
                    starts[plane] += piece.size
                elif mode == ONE:
                    piece[:] = number
                else:
                    if number not in slots:
                        slots = {number: compiled(_slots)(tables[number])}
                    if not compiled(_decode)(data, slots[number], cursors[plane], states[plane], piece):
                        raise damaged("a stream must have as many bits as its symbols take, got fewer")
        compiled(_merge)(planes, part)
    if states.any() or (cursors[:, 0] != cursors[:, 1]).any():
        raise damaged("every stream must be used up and end in the states that its encoder began in; one does not")
    return words


class _Reader:
    """Takes bytes from the front of a payload, never more than there are."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._position = 0

    @property
    def left(self) -> int:
        return len(self._payload) - self._position

    def take(self, n_bytes: int) -> memoryview:
        begin, end = self._position, self._position + n_bytes
        if end > len(self._payload):
            raise damaged(f"a payload must have {end} bytes or more, got {len(self._payload)}")
        self._position = end
        return self._payload[begin:end]


@cache
def _information() -> np.ndarray:
    """c * log2(c) for the counts of a block."""
    counts = np.arange(BLOCK + 1)
    return counts * np.log2(np.maximum(counts, 1))


def _raw_sizes(modes: np.ndarray, n: int) -> np.ndarray:
    """Bytes of the raw blocks of each plane."""
    raw = modes == RAW
    return raw.sum(1) * BLOCK - raw[:, -1] * (-n % BLOCK)


def _runs(modes: np.ndarray, numbers: np.ndarray) -> list[list[tuple[int, int, int, int]]]:
    """Stretches of blocks that are alike, for all the blocks at once: the first, the one after, mode and number."""
    if not modes.any():
        return [[(0, min(_AT_ONCE, len(modes) - base), RAW, 0)] for base in range(0, len(modes), _AT_ONCE)]
    runs = []
    kinds, listed = np.minimum(modes, SAME).tolist(), np.where(modes == RAW, 0, numbers).tolist()
    for base in range(0, len(kinds), _AT_ONCE):
        own, begin, stop = [], base, min(base + _AT_ONCE, len(kinds))
        for block in range(base + 1, stop + 1):
            if block == stop or kinds[block] != kinds[begin] or listed[block] != listed[begin]:
                own.append((begin - base, block - base, kinds[begin], listed[begin]))
                begin = block
        runs.append(own)
    return runs


def _scratch(n_planes: int) -> np.ndarray:
    """Room for the planes of the blocks at once, kept for each thread: memory that is new is slow."""
    if not hasattr(_KEPT, "planes"):
        _KEPT.planes = np.empty((8, _AT_ONCE * BLOCK), np.uint8)
    return _KEPT.planes[:n_planes]


def _packed(modes: np.ndarray) -> bytes:
    flat = np.zeros(-(-modes.size // 4) * 4, np.uint8)
    flat[: modes.size] = modes.reshape(-1)
    return (flat.reshape(-1, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(1, dtype=np.uint8).tobytes()


def _unpacked(packed: memoryview, n_planes: int, n_blocks: int) -> np.ndarray:
    flat = (np.frombuffer(packed, np.uint8)[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1)
    if flat[n_planes * n_blocks :].any():
        raise damaged("bits after the mode of the last block must be zero")
    return flat[: n_planes * n_blocks].reshape(n_planes, n_blocks)


def _described(table: np.ndarray) -> bytes:
    """First symbol, number of symbols less one, then twelve bits each: pairs of three bytes, the last padded."""
    used = np.flatnonzero(table)
    first, more = int(used[0]), int(used[-1] - used[0])
    pairs = np.zeros((more + 2) // 2 * 2, np.int64)
    pairs[: more + 1] = table[first : first + more + 1]
    packed = (pairs[::2] + pairs[1::2] * _SLOTS).astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]
    return bytes([first, more]) + packed.tobytes()


def _table(reader: _Reader) -> np.ndarray:
    first, more = reader.take(_INDEX_BYTES)
    if first + more > 255:
        raise damaged("the symbols of a table must be below 256")
    packed = np.frombuffer(reader.take((more + 2) // 2 * 3), np.uint8).reshape(-1, 3).astype(np.int64)
    table = np.zeros(258, np.int64)  # with room for what pads the last pair
    table[first : first + more + 1 : 2] = packed[:, 0] | (packed[:, 1] & 15) << 8
    table[first + 1 : first + more + 2 : 2] = packed[:, 1] >> 4 | packed[:, 2] << 4
    if table[first + more + 1 :].any() or table.sum() != _SLOTS:
        raise damaged(f"a table must give away {_SLOTS} slots, got {table.sum()}")
    return table[:256]


def _split(words, planes):
    """Fill planes (bytes of a word, n or more) with the bytes of words (n,), turned left by one bit, the lowest first."""
    n = words.size
    if planes.shape[0] == 2:
        for i in range(n):
            word = np.uint32(words[i])
            planes[0, i] = np.uint8(word << 1 | word >> 15)
            planes[1, i] = np.uint8(word >> 7)
    elif planes.shape[0] == 4:
        for i in range(n):
            word = np.uint32(words[i])
            planes[0, i] = np.uint8(word << 1 | word >> 31)
            planes[1, i] = np.uint8(word >> 7)
            planes[2, i] = np.uint8(word >> 15)
            planes[3, i] = np.uint8(word >> 23)
    else:
        for plane in range(1, 8):
            for i in range(n):
                planes[plane, i] = np.uint8(np.uint64(words[i]) >> np.uint64(8 * plane - 1))
        for i in range(n):
            planes[0, i] = np.uint8(np.uint64(words[i]) << np.uint64(1) | np.uint64(words[i]) >> np.uint64(63))


def _merge(planes, words):
    """Undo _split."""
    n = words.size
    if planes.shape[0] == 2:
        for i in range(n):
            word = np.uint32(planes[0, i]) | np.uint32(planes[1, i]) << 8
            words[i] = word >> 1 | word << 15
    elif planes.shape[0] == 4:
        for i in range(n):
            low = np.uint32(planes[0, i]) | np.uint32(planes[1, i]) << 8
            word = low | np.uint32(planes[2, i]) << 16 | np.uint32(planes[3, i]) << 24
            words[i] = np.uint32(word) >> 1 | np.uint32(word) << 31
    else:
        for i in range(n):
            words[i] = np.uint64(planes[0, i]) >> np.uint64(1) | np.uint64(planes[0, i]) << np.uint64(63)
        for plane in range(1, 8):
            for i in range(n):
                words[i] |= np.uint64(planes[plane, i]) << np.uint64(8 * plane - 1)


def _survey(row, sampled, information, counts, modes, values):
    """The mode of every block of a plane (raw, one value, or coded); the histogram of every coded block."""
    n = row.size
    parts = np.empty((4, 256), np.int64)
    for block in range(modes.size):
        start = block * BLOCK
        size = min(BLOCK, n - start)
        quarter = size // 4
        for attempt in range(2):  # first by a sample, then by all bytes
            if attempt == 0 and (not sampled or size < BLOCK):
                continue
            parts[:] = 0
            taken = quarter if attempt else _SAMPLED
            total = size if attempt else 4 * taken
            for i in range(start, start + taken):
                parts[0, row[np.uint64(i)]] += 1
                parts[1, row[np.uint64(i + quarter)]] += 1
                parts[2, row[np.uint64(i + 2 * quarter)]] += 1
                parts[3, row[np.uint64(i + 3 * quarter)]] += 1
            if attempt:
                for i in range(start + 4 * quarter, start + size):
                    parts[0, row[np.uint64(i)]] += 1
            bits = information[total]
            used = 0
            for symbol in range(256):
                count = parts[0, symbol] + parts[1, symbol] + parts[2, symbol] + parts[3, symbol]
                counts[block, symbol] = count
                bits -= information[count]
                if count:
                    used += 1
                    values[block] = symbol
            if bits >= WORTH * 8 * total:
                break
        if used == 1:
            modes[block] = ONE
        else:
            modes[block] = RAW if bits >= WORTH * 8 * total else SAME


def _group(counts, modes, information, numbers, tables, n_tables):
    """Where new tables pay: modes, the number of each block's table, the tables; return how many, and bits of all that.

    A block joins the blocks before it unless a table of its own is cheaper than what the common one costs both.
    """
    all_bits = 0.0
    total = np.zeros(256, np.int64)
    total_bits = 0.0
    is_open = False
    for block in range(modes.size + 1):
        ends = block == modes.size
        own, joint = 0.0, 0.0
        if not ends:
            if modes[block] != SAME:
                continue
            n, n_joint, n_used = 0, 0, 0
            for symbol in range(256):
                count = counts[block, symbol]
                if count or total[symbol]:
                    both = total[symbol] + count
                    own -= information[count]
                    joint -= both * np.log2(both)
                    n += count
                    n_joint += both
                    n_used += count > 0
            own += information[n]
            joint += n_joint * np.log2(n_joint)
            ends = is_open and joint - total_bits - own > 8 * _INDEX_BYTES + _PRECISION * n_used
        if ends and is_open:
            table = tables[n_tables]
            n_total = total.sum()
            for symbol in range(256):
                wanted = (total[symbol] * _SLOTS + n_total // 2) // n_total
                table[symbol] = max(wanted, 1) if total[symbol] else 0
            missing = _SLOTS - table.sum()
            while missing != 0:
                step = 1 if missing > 0 else -1
                table[table.argmax()] += step
                missing -= step
            used = np.flatnonzero(table)
            all_bits += 8 * _INDEX_BYTES + _PRECISION * (1 + used[-1] - used[0])
            all_bits += (total[used] * (_PRECISION - np.log2(table[used]))).sum()
            n_tables += 1
            is_open = False
        if block < modes.size:
            if is_open:
                total += counts[block]
                total_bits = joint
            else:
                modes[block] = NEW
                total[:] = counts[block]
                total_bits = own
                is_open = True
            numbers[block] = n_tables
    return n_tables, all_bits


def _transitions(table):
    """For the encoder: the states that follow, by symbol, and what to add to a state for its bits and for its place."""
    following = np.empty(_SLOTS, np.uint16)
    for_bits = np.zeros(256, np.uint64)
    for_place = np.zeros(256, np.uint64)
    spread = np.empty(_SLOTS, np.uint8)
    place = np.empty(256, np.int64)
    slot, begin = 0, 0
    for symbol in range(256):
        frequency = table[symbol]
        for _ in range(frequency):
            spread[slot] = symbol
            slot = (slot + (_SLOTS >> 1) + (_SLOTS >> 3) + 3) & (_SLOTS - 1)
        most = 0  # bits, from a state of the upper part; one less from the others
        while (frequency << most) < 2 * _SLOTS and frequency:
            most += 1
        most -= 1
        for_bits[symbol] = np.uint64((most << 16) - (frequency << most))
        for_place[symbol] = np.uint64(begin - frequency)  # wraps round, and back when a state is added
        place[symbol] = begin
        begin += frequency
    for slot in range(_SLOTS):
        symbol = spread[slot]
        following[place[symbol]] = _SLOTS + slot
        place[symbol] += 1
    return following, for_bits, for_place


def _slots(table):
    """For the decoder, of every slot: the symbol, 8 bits; how many bits follow, 8 bits; the least state after them."""
    slots = np.empty(_SLOTS, np.uint32)
    spread = np.empty(_SLOTS, np.uint8)
    reached = table.copy()
    slot = 0
    for symbol in range(256):
        for _ in range(table[symbol]):
            spread[slot] = symbol
            slot = (slot + (_SLOTS >> 1) + (_SLOTS >> 3) + 3) & (_SLOTS - 1)
    for slot in range(_SLOTS):
        symbol = spread[slot]
        state = reached[symbol]
        reached[symbol] += 1
        n_bits = 0
        while (state << n_bits) < _SLOTS:
            n_bits += 1
        slots[slot] = ((state << n_bits) - _SLOTS) << 16 | n_bits << 8 | symbol
    return slots


def _encode(row, following, for_bits, for_place, room, cursor, states):
    """Put the bits of row in front of those in room; cursor: where the words begin, bits that are none yet, their number."""
    one, half, word_bits, masked = np.uint64(1), np.uint64(16), np.uint64(32), np.uint64(63)
    position, buffer, pending = np.int64(cursor[0]), cursor[1], cursor[2]
    n = row.size
    for last in range(n - 1, n - n % 4 - 1, -1):
        symbol = row[last]
        state = states[last % 4]
        n_bits = (state + for_bits[symbol]) >> half
        buffer = buffer << n_bits | (state & ((one << n_bits) - one))
        states[last % 4] = following[(state >> n_bits) + for_place[symbol]]
        pending += n_bits
        room[position - 1] = np.uint32(buffer >> ((pending - word_bits) & masked))
        if pending >= word_bits:
            position -= 1
            pending -= word_bits
    a, b, c, d = states[0], states[1], states[2], states[3]
    for j in range(n - n % 4 - 4, -1, -4):
        i = np.uint64(j)
        symbol = row[i + np.uint64(3)]
        n_bits = (d + for_bits[symbol]) >> half
        buffer = buffer << n_bits | (d & ((one << n_bits) - one))
        pending += n_bits
        d = np.uint64(following[(d >> n_bits) + for_place[symbol]])
        symbol = row[i + np.uint64(2)]
        n_bits = (c + for_bits[symbol]) >> half
        buffer = buffer << n_bits | (c & ((one << n_bits) - one))
        pending += n_bits
        c = np.uint64(following[(c >> n_bits) + for_place[symbol]])
        room[np.uint64(position - 1)] = np.uint32(buffer >> ((pending - word_bits) & masked))
        full = pending >= word_bits
        position -= full
        pending -= word_bits if full else np.uint64(0)
        symbol = row[i + one]
        n_bits = (b + for_bits[symbol]) >> half
        buffer = buffer << n_bits | (b & ((one << n_bits) - one))
        pending += n_bits
        b = np.uint64(following[(b >> n_bits) + for_place[symbol]])
        symbol = row[i]
        n_bits = (a + for_bits[symbol]) >> half
        buffer = buffer << n_bits | (a & ((one << n_bits) - one))
        pending += n_bits
        a = np.uint64(following[(a >> n_bits) + for_place[symbol]])
        room[np.uint64(position - 1)] = np.uint32(buffer >> ((pending - word_bits) & masked))
        full = pending >= word_bits
        position -= full
        pending -= word_bits if full else np.uint64(0)
    states[0], states[1], states[2], states[3] = a, b, c, d
    cursor[0], cursor[1], cursor[2] = position, buffer, pending


def _decode(body, slots, cursor, states, row):
    """Fill row from the bits after cursor[0]; False if that passes cursor[1].

    Eight bytes are read at a place that is at most where a stream ends. A state is below 4,096 whatever the bits are:
    the n bits that follow a slot are added to a multiple of 2**n below 4,096.
    """
    one, three, byte, some = np.uint64(1), np.uint64(3), np.uint64(255), np.uint64(15)
    low, half, eight = np.uint64(7), np.uint64(16), np.uint64(8)
    position, end = cursor[0], cursor[1]
    a, b, c, d = states[0], states[1], states[2], states[3]
    n = row.size
    for j in range(0, n - 3, 4):
        if position > end:
            return False
        i = np.uint64(j)
        k = position >> three
        bits = (
            np.uint64(body[k])
            | np.uint64(body[k + np.uint64(1)]) << np.uint64(8)
            | np.uint64(body[k + np.uint64(2)]) << np.uint64(16)
            | np.uint64(body[k + np.uint64(3)]) << np.uint64(24)
            | np.uint64(body[k + np.uint64(4)]) << np.uint64(32)
            | np.uint64(body[k + np.uint64(5)]) << np.uint64(40)
            | np.uint64(body[k + np.uint64(6)]) << np.uint64(48)
            | np.uint64(body[k + np.uint64(7)]) << np.uint64(56)
        )  # and every state takes its own from them, so that none waits for another
        slot_a, slot_b, slot_c, slot_d = np.uint64(slots[a]), np.uint64(slots[b]), np.uint64(slots[c]), np.uint64(slots[d])
        row[i] = slot_a & byte
        row[i + one] = slot_b & byte
        row[i + np.uint64(2)] = slot_c & byte
        row[i + three] = slot_d & byte
        bits_a, bits_b = slot_a >> eight & some, slot_b >> eight & some
        bits_c, bits_d = slot_c >> eight & some, slot_d >> eight & some
        from_a = position & low
        from_b = from_a + bits_a
        from_c = from_b + bits_b
        from_d = from_c + bits_c
        a = (slot_a >> half) + (bits >> from_a & ((one << bits_a) - one))
        b = (slot_b >> half) + (bits >> from_b & ((one << bits_b) - one))
        c = (slot_c >> half) + (bits >> from_c & ((one << bits_c) - one))
        d = (slot_d >> half) + (bits >> from_d & ((one << bits_d) - one))
        position += bits_a + bits_b + bits_c + bits_d
    states[0], states[1], states[2], states[3] = a, b, c, d
    for last in range(n - n % 4, n):
        if position > end:
            return False
        k = position >> three
        bits = np.uint64(body[k]) | np.uint64(body[k + one]) << eight | np.uint64(body[k + np.uint64(2)]) << half
        slot = np.uint64(slots[states[last % 4]])
        n_bits = slot >> eight & some
        row[last] = slot & byte
        states[last % 4] = (slot >> half) + (bits >> (position & low) & ((one << n_bits) - one))
        position += n_bits
    cursor[0] = position
    return position <= end

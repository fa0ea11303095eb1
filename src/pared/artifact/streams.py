"""Stored tensors as coded streams: one each, or small ones of a kind together where that takes fewer bytes.

Which small tensors go together is tried out, unless they are such a small part of the file that it would not show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pared import store
from pared.artifact.body import varint
from pared.artifact.tensors import Kind
from pared.errors import ArtifactError, StoreError

_SMALL = 1024  # elements: what is larger has a stream of its own
_RATHER_SMALL = 4096  # the same, where nothing is tried
_MINOR = 1 / 32  # of all bytes: up to here nothing is tried
_LARGEST_GROUP = 1 << 16
_MOST_PIECES = 16
_MEMBER_BYTES = 1  # what naming a member of a group takes in the manifest


class Streams:
    """The data of a file.

    Args:
        arrays: carriers of the stored tensors, in order, with the path of each.
        prefer: as for `pared.store.encode`.

    Attributes:
        coders: names of the coders used, the most frequent first.
        groups: numbers of the tensors that share a stream.
        payloads: number of the coder and bytes of each stream, in the order of their first tensors.
    """

    def __init__(self, arrays: Sequence[tuple[str, np.ndarray]], prefer: str) -> None:
        grouping = _Grouping(arrays, prefer)
        self.groups = grouping.groups()
        coded = [grouping.code(tuple(m)) for m in members_of([array.size for _, array in arrays], self.groups)]
        names = [name for name, _ in coded]
        self.coders = sorted(set(names), key=lambda name: (-names.count(name), name))
        self.payloads = [(self.coders.index(name), payload) for name, payload in coded]


def members_of(sizes: Sequence[int], groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tensors of each stream, in the order of the file; tensors without elements have none."""
    group_of = {member: group for group in groups for member in group}
    streams: list[list[int]] = []
    for number, size in enumerate(sizes):
        group = group_of.get(number, [number])
        if size and group[0] == number:
            streams.append(list(group))
    return streams


def check_groups(kinds: Sequence[Kind], groups: Sequence[Sequence[int]]) -> None:
    """Raise an ArtifactError unless every group is of distinct, ascending tensors of one type, all with elements."""
    seen: set[int] = set()
    for group in groups:
        if len(group) < 2 or list(group) != sorted(set(group)) or group[-1] >= len(kinds) or seen.intersection(group):
            raise ArtifactError("a group must be two or more tensors, each in one group only; the file is damaged")
        seen.update(group)
        if len({kinds[member].carrier[0] for member in group}) > 1 or not all(kinds[member].numel for member in group):
            raise ArtifactError("the tensors of a group must be of one type and have elements; the file is damaged")


def decode(
    payloads: Sequence[tuple[int, memoryview]],
    kinds: Sequence[Kind],
    paths: Sequence[str],
    coders: Sequence[str],
    groups: Sequence[Sequence[int]],
) -> list[np.ndarray]:
    """The carriers of all stored tensors, in order. The caller has checked the groups and the sizes."""
    arrays: list[np.ndarray | None] = [np.empty(kind.carrier[1], kind.carrier[0]) if not kind.numel else None for kind in kinds]
    for (coder, payload), members in zip(payloads, members_of([kind.numel for kind in kinds], groups), strict=True):
        first = kinds[members[0]].carrier
        shapes = [kinds[member].carrier[1] for member in members]
        shape = first[1] if len(members) == 1 else (sum(map(math.prod, shapes)),)
        try:
            joined = store.decode(coders[coder], payload, shape, first[0])
        except StoreError as error:
            raise ArtifactError(f"{paths[members[0]]}: {error}") from error
        if joined.shape != shape or joined.dtype != first[0]:
            raise ArtifactError(f"{paths[members[0]]} must be {shape} after decoding, got {joined.shape}")
        start = 0
        for member, own in zip(members, shapes, strict=True):
            stop = start + math.prod(own)
            arrays[member] = joined.reshape(-1)[start:stop].reshape(own)
            start = stop
    return [array for array in arrays if array is not None]


class _Grouping:
    """Which small tensors go together: of one type, first those of one name, neighbours in spread, while that saves bytes."""

    def __init__(self, arrays: Sequence[tuple[str, np.ndarray]], prefer: str) -> None:
        self.arrays = arrays
        self.prefer = prefer
        self._coded: dict[tuple[int, ...], tuple[str, bytes | memoryview]] = {}

    def code(self, members: tuple[int, ...]) -> tuple[str, bytes | memoryview]:
        if members not in self._coded:
            parts = [self.arrays[member][1] for member in members]
            joined = parts[0] if len(parts) == 1 else np.concatenate([part.reshape(-1) for part in parts])
            self._coded[members] = store.encode(joined, self.prefer)
        return self._coded[members]

    def groups(self) -> list[list[int]]:
        by_name = self._by_name(_RATHER_SMALL)
        n_bytes = sum(self.arrays[number][1].nbytes for members in by_name.values() for number in members)
        if n_bytes <= _MINOR * sum(array.nbytes for _, array in self.arrays):
            return sorted(group for members in by_name.values() for group in self._filled(members) if len(group) > 1)
        by_name = self._by_name(_SMALL)
        by_type: dict[np.dtype[Any], list[tuple[int, ...]]] = {}
        for (_, dtype), members in by_name.items():
            by_type.setdefault(dtype, []).extend(self._merged(self._pieces(members)))
        merged = [group for groups in by_type.values() for group in self._merged(groups)]
        return sorted(list(group) for group in merged if len(group) > 1)

    def _by_name(self, largest: int) -> dict[tuple[str, np.dtype[Any]], list[int]]:
        """The tensors of so many elements, by the last part of their path and by type."""
        by_name: dict[tuple[str, np.dtype[Any]], list[int]] = {}
        for number, (path, array) in enumerate(self.arrays):
            if 0 < array.size <= largest:
                by_name.setdefault((path.rpartition(".")[2], array.dtype), []).append(number)
        return by_name

    def _filled(self, members: list[int]) -> list[list[int]]:
        """The members in order, as many together as a group may hold."""
        groups: list[list[int]] = [[]]
        size = 0
        for member in members:
            size += self.arrays[member][1].size
            if size > _LARGEST_GROUP:
                groups.append([])
                size = self.arrays[member][1].size
            groups[-1].append(member)
        return groups

    def _pieces(self, members: list[int]) -> list[tuple[int, ...]]:
        """At most so many tuples of neighbours in spread that trying to join them takes no time."""
        ordered = sorted(members, key=lambda member: (self._spread(member), member))
        step = -(-len(ordered) // _MOST_PIECES)
        return [tuple(sorted(ordered[start : start + step])) for start in range(0, len(ordered), step)]

    def _merged(self, groups: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Neighbours joined as long as that saves bytes."""
        groups = sorted(groups, key=lambda group: (self._spread(group[0]), group))
        position = 0
        while position + 1 < len(groups):
            joined = tuple(sorted(groups[position] + groups[position + 1]))
            small = sum(self.arrays[member][1].size for member in joined) <= _LARGEST_GROUP
            if small and self._cost(joined) < self._cost(groups[position]) + self._cost(groups[position + 1]):
                groups[position : position + 2] = [joined]
                position = max(0, position - 1)
            else:
                position += 1
        return groups

    def _cost(self, members: tuple[int, ...]) -> int:
        """Bytes of a stream, with what its length and naming its members take."""
        n_bytes = len(self.code(members)[1])
        return n_bytes + len(varint(4 * n_bytes)) + (_MEMBER_BYTES * len(members) if len(members) > 1 else 0)

    def _spread(self, member: int) -> float:
        array = self.arrays[member][1]
        values = array[np.isfinite(array)] if array.dtype.kind == "f" else array
        return float(np.abs(values.astype(np.float64)).mean()) if values.size else 0.0

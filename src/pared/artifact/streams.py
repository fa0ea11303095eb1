"""Stored tensors as coded streams: one each, or small ones of a kind together where that takes fewer bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pared import store
from pared.artifact.body import varint
from pared.artifact.tensors import Kind
from pared.errors import ArtifactError, StoreError

_SMALL = 4096  # elements: what is larger has a stream of its own
_LARGEST_GROUP = 1 << 16
_MEMBER_BITS = 16  # what naming a member of a group costs in the manifest


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
        flat = [array for _, array in arrays]
        self.groups = _groups(arrays, prefer)
        coded = []
        for members in members_of([array.size for array in flat], self.groups):
            joined = flat[members[0]] if len(members) == 1 else np.concatenate([flat[m].reshape(-1) for m in members])
            coded.append(store.encode(joined, prefer))
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


def _groups(arrays: Sequence[tuple[str, np.ndarray]], prefer: str) -> list[list[int]]:
    """Small tensors of one type and last name, joined one after the other where that makes the file smaller."""
    by_kind: dict[tuple[str, np.dtype], list[list[int]]] = {}
    bits: dict[tuple[int, ...], float] = {}

    def cost(members: list[int]) -> float:
        key = tuple(members)
        if key not in bits:
            joined = np.concatenate([arrays[member][1].reshape(-1) for member in members])
            payload = store.encode(joined, prefer)[1]
            bits[key] = 8 * (len(payload) + len(varint(8 * len(payload)))) + (_MEMBER_BITS * len(members) if members[1:] else 0)
        return bits[key]

    for number, (path, array) in enumerate(arrays):
        if not 0 < array.size <= _SMALL:
            continue
        groups = by_kind.setdefault((path.rpartition(".")[2], array.dtype), [])
        for group in groups:
            size = sum(arrays[member][1].size for member in group)
            if size + array.size <= _LARGEST_GROUP and cost([*group, number]) < cost(group) + cost([number]):
                group.append(number)
                break
        else:
            groups.append([number])
    by_type: dict[np.dtype, list[list[int]]] = {}
    for (_, dtype), groups in by_kind.items():
        for group in groups:
            kept = by_type.setdefault(dtype, [])
            for other in kept:
                joined = sorted([*other, *group])
                size = sum(arrays[member][1].size for member in joined)
                if size <= _LARGEST_GROUP and cost(joined) < cost(other) + cost(group):
                    other[:] = joined
                    break
            else:
                kept.append(group)
    return sorted(group for groups in by_type.values() for group in groups if len(group) > 1)

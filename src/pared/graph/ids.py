"""Which channels live or die together: a union-find over ids, where an id may stand for either of two others."""

from __future__ import annotations

from typing import final

import numpy as np

NONE = -1
"""In an array of ids: this position belongs to no channel and always stays."""

_DEPTH = 12
"""Parts within parts that are followed all at once; deeper ones, and parts that hold themselves, one by one."""

Factors = tuple[np.ndarray, ...]
"""One axis: arrays of ids, each as long as the axis. A position goes when any of its ids goes. (): it stays whole."""


@final
class Ids:
    """Every id is a channel that is removed or stays.

    Three facts can be told: two ids are the same channel (`union`); an id stays (`freeze`, with a reason); an id goes
    exactly when one of two others goes (what `compose` gives: position (h, d) of an axis that is later taken apart into
    heads and slots of a head). Everything takes whole arrays.
    """

    def __init__(self) -> None:
        self.n = 0
        self._parent = np.zeros(1024, np.int64)
        self._left = np.full(1024, NONE)
        self._right = np.full(1024, NONE)
        self._reason: dict[int, str] = {}
        self._stays = np.zeros(1024, bool)
        self._composed: dict[tuple[int, int], int] = {}

    def new(self, n: int) -> np.ndarray:
        """n ids of which nothing is known yet."""
        if self.n + n > len(self._parent):
            more = max(n, len(self._parent))
            self._parent = np.concatenate([self._parent, np.zeros(more, np.int64)])
            self._left, self._right = (np.concatenate([a, np.full(more, NONE)]) for a in (self._left, self._right))
            self._stays = np.concatenate([self._stays, np.zeros(more, bool)])
        found = np.arange(self.n, self.n + n)
        self._parent[found] = found
        self.n += n
        return found

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The representative of each id; NONE stays NONE."""
        if not self.n:
            return ids
        known = ids >= 0
        roots = np.where(known, self._parent[ids], NONE)
        while True:
            above = np.where(known, self._parent[roots], NONE)
            if np.array_equal(above, roots):
                self._parent[ids[known]] = roots[known]
                return roots
            roots = above

    def union(self, a: np.ndarray, b: np.ndarray, reason: str = "") -> None:
        """a[i] and b[i] are the same channel; where one of them is NONE, the other stays, for the reason."""
        for one, other in ((a, b), (b, a)):
            self.freeze(one[(one >= 0) & (other < 0)], reason)
        both = (a >= 0) & (b >= 0)
        todo = [(a[both], b[both])]
        while todo:
            a, b = todo.pop()
            a, b = self.find(a), self.find(b)
            apart = a != b
            if not apart.any():
                continue
            a, b = a[apart], b[apart]
            high, first = np.unique(np.maximum(a, b), return_index=True)
            self._parent[high] = np.minimum(a, b)[first]
            todo += [(a, b), *self._inherit(high)]
            self._open(high)

    def _inherit(self, merged: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """What was known of ids that have just got another representative; gives the unions that follow."""
        found = []
        merged = merged[(self._left[merged] >= 0) | self._stays[merged]]
        whole = (self.find(ids).tolist() for ids in (merged, self._left[merged], self._right[merged]))
        for old, root, *parts in zip(merged.tolist(), *whole):
            left, right = self._left[old], self._right[old]
            if left >= 0:
                if self._left[root] >= 0:
                    found.append((np.array([left, right]), np.array([self._left[root], self._right[root]])))
                elif any(part == root or (self._left[part] >= 0 and self._holds(part, root)) for part in parts):
                    self.freeze(np.array([left, right, root]), "its positions are tied to one another")
                else:
                    self._left[root], self._right[root] = left, right
                    if root in self._reason:
                        self.freeze(np.array([left, right]), self._reason[root])
            if old in self._reason:
                self.freeze(np.array([root]), self._reason[old])
        return found

    def _open(self, merged: np.ndarray) -> None:
        """What became a part of itself stays, with its parts."""
        roots = np.unique(self.find(merged))
        roots = roots[self._left[roots] >= 0]
        whole, part = roots, roots
        looped = np.zeros(0, np.int64)
        for _ in range(_DEPTH):  # all at once: who lies within whom, one level after the other
            inner = self._left[part] >= 0
            whole, part = np.tile(whole[inner], 2), self.find(np.concatenate([self._left[part[inner]], self._right[part[inner]]]))
            if not len(part):
                break
            looped = np.union1d(looped, whole[part == whole])
            whole, part = np.divmod(np.unique(whole * self.n + part), self.n)
        else:
            looped = np.array([root for root in roots.tolist() if self._is_looped(root)], np.int64)
        for root in looped.tolist():
            if self._left[root] >= 0 and self._is_looped(root):
                parts = np.array([self._left[root], self._right[root]])
                self._left[root] = self._right[root] = NONE
                self.freeze(np.append(parts, root), "its positions are tied to one another")

    def _is_looped(self, root: int) -> bool:
        return self._holds(int(self._left[root]), root) or self._holds(int(self._right[root]), root)

    def _holds(self, part: int, whole: int) -> bool:
        """Whether a part is the whole, or has it among its own parts."""
        seen: set[int] = set()
        todo = [part]
        while todo:
            root = int(self.find(np.array([todo.pop()]))[0])
            if root == whole:
                return True
            if root not in seen and self._left[root] >= 0:
                todo += [int(self._left[root]), int(self._right[root])]
            seen.add(root)
        return False

    def freeze(self, ids: np.ndarray, reason: str) -> None:
        """These channels stay; the first reason counts."""
        roots = np.unique(self.find(ids[ids >= 0]))
        for root in roots[~self._stays[roots]].tolist():
            self._reason[root] = reason
            self._stays[root] = True
            if self._left[root] >= 0:
                self.freeze(np.array([self._left[root], self._right[root]]), reason)

    def free(self, ids: np.ndarray) -> bool:
        """Whether any of them may go."""
        roots = self.find(ids[ids >= 0])
        return bool((~self._stays[roots]).any())

    def reason(self, root: int) -> str | None:
        """Why a representative stays, or None if it may go."""
        return self._reason.get(root)

    def factors(self, *arrays: np.ndarray) -> Factors:
        """The same axis in ids that stand for nothing but themselves."""
        found: list[np.ndarray] = []
        for array in arrays:
            roots = self.find(array)
            split = (roots >= 0) & (self._left[roots] >= 0)
            if split.any():
                left, right = self._left[roots], self._right[roots]
                found += self.factors(np.where(split, left, roots), np.where(split, right, NONE))
            elif (roots >= 0).any():
                found.append(roots)
        return tuple(found)

    def compose(self, *arrays: np.ndarray) -> np.ndarray:
        """One id for each position: it goes when any of the position's ids goes."""
        whole = self.find(arrays[0])
        for array in arrays[1:]:
            other = self.find(array)
            both = (whole >= 0) & (other >= 0) & (whole != other)
            n = self.n
            distinct, which = np.unique(whole[both] * n + other[both], return_inverse=True)
            made = np.array([self._pair(*divmod(pair, n)) for pair in distinct.tolist()], np.int64)
            joined = np.where(whole >= 0, whole, other)
            joined[both] = made[which.reshape(-1)] if len(made) else joined[both]
            whole = joined
        return whole

    def _pair(self, left: int, right: int) -> int:
        known = self._composed.get((left, right))
        if known is None:
            known = self._composed[left, right] = int(self.new(1)[0])
            self._left[known], self._right[known] = left, right
        return known

    def same(self, a: Factors, b: Factors, reason: str) -> Factors:
        """Two axes that are read together: position by position they go together."""
        if not a or not b:
            for array in a or b:
                self.freeze(array, reason)
            return ()
        self.union(self.compose(*self.factors(*a)), self.compose(*self.factors(*b)), reason)
        return self.factors(*a)

    def split(self, axis: Factors, rows: int, columns: int, reason: str) -> tuple[Factors, Factors]:
        """An axis of rows * columns positions taken apart in two: whole rows go, or the same columns of every row."""
        outer: list[np.ndarray] = []
        inner: list[np.ndarray] = []
        for array in self.factors(*axis):
            grid = array.reshape(rows, columns)
            if (grid == grid[:, :1]).all():
                outer.append(grid[:, 0])
            elif (grid == grid[:1]).all():
                inner.append(grid[0])
            else:
                down, across = self.new(rows), self.new(columns)
                cells = self.compose(np.repeat(down, columns), np.tile(across, rows))
                self.union(cells, array, reason)
                outer.append(down)
                inner.append(across)
        return self.factors(*outer), self.factors(*inner)

    def join(self, outer: Factors, rows: int, inner: Factors, columns: int) -> Factors:
        """Two neighbouring axes as one."""
        return self.factors(*(np.repeat(a, columns) for a in outer), *(np.tile(a, rows) for a in inner))


def concatenated(parts: list[tuple[Factors, int]]) -> Factors:
    """Axes (with their sizes) one after the other."""
    depth = max((len(axis) for axis, _ in parts), default=0)
    return tuple(
        np.concatenate([axis[k] if k < len(axis) else np.full(size, NONE) for axis, size in parts]) for k in range(depth)
    )


def taken(axis: Factors, where: slice | np.ndarray) -> Factors:
    """The axis at some positions."""
    return tuple(array[where] for array in axis)

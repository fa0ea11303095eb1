"""Ids of channels: what is told of them holds, in whatever order it is told."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pared.graph.ids import NONE, Ids, concatenated, taken

pairs = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20)


def goes(ids, axis, gone):
    """Which positions of an axis go when these representatives do."""
    found = np.zeros(len(axis[0]), bool)
    for array in ids.factors(*axis):
        found |= np.isin(array, list(gone)) & (array >= 0)
    return found


@given(pairs)
def test_ids_are_the_same_exactly_when_a_chain_of_unions_joins_them(told):
    ids = Ids()
    ids.new(12)
    classes = [{i} for i in range(12)]
    for a, b in told:
        ids.union(np.array([a]), np.array([b]))
        if classes[a] is not classes[b]:
            classes[a] |= classes[b]
            for i in classes[b]:
                classes[i] = classes[a]
    roots = ids.find(np.arange(12))
    assert all((roots[i] == roots[j]) == (classes[i] is classes[j]) for i in range(12) for j in range(12))


@given(pairs, st.lists(st.integers(0, 11), max_size=4))
def test_what_is_frozen_stays_with_all_that_is_the_same(told, frozen):
    ids = Ids()
    ids.new(12)
    half = len(told) // 2
    for a, b in told[:half]:
        ids.union(np.array([a]), np.array([b]))
    ids.freeze(np.array(frozen, np.int64), "because")
    for a, b in told[half:]:
        ids.union(np.array([a]), np.array([b]))
    roots = ids.find(np.arange(12))
    held = {roots[i] for i in frozen}
    assert {int(r) for r in roots if ids.reason(int(r))} == held


def test_a_channel_that_meets_none_stays_for_the_reason():
    ids = Ids()
    a = ids.new(3)
    ids.union(a, np.array([NONE, NONE, ids.new(1)[0]]), "it meets an image")
    assert [ids.reason(int(r)) for r in ids.find(a)] == ["it meets an image", "it meets an image", None]


@given(st.integers(2, 5), st.integers(2, 5))
def test_an_axis_taken_apart_and_joined_again_is_the_same(rows, columns):
    ids = Ids()
    axis = (ids.new(rows * columns),)
    outer, inner = ids.split(axis, rows, columns, "")
    joined = ids.join(outer, rows, inner, columns)
    assert all(np.array_equal(a, b) for a, b in zip(ids.factors(*axis), joined, strict=True))
    again = ids.split(axis, rows, columns, "")
    assert all(np.array_equal(a, b) for a, b in zip((*outer, *inner), (*again[0], *again[1]), strict=True))


@given(st.integers(2, 4), st.integers(2, 4), st.data())
def test_a_position_of_a_split_axis_goes_when_its_row_or_its_column_goes(rows, columns, data):
    ids = Ids()
    axis = (ids.new(rows * columns),)
    outer, inner = ids.split(axis, rows, columns, "")
    down = data.draw(st.sets(st.integers(0, rows - 1)))
    across = data.draw(st.sets(st.integers(0, columns - 1)))
    gone = {int(outer[0][r]) for r in down} | {int(inner[0][c]) for c in across}
    expected = [[r in down or c in across for c in range(columns)] for r in range(rows)]
    assert np.array_equal(goes(ids, axis, gone), np.array(expected).reshape(-1))


def test_axes_split_alike_and_read_together_share_rows_and_columns():
    ids = Ids()
    a, b = (ids.new(12),), (ids.new(12),)
    first, second = ids.split(a, 3, 4, ""), ids.split(b, 3, 4, "")
    ids.same(a, b, "")
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(ids.find(one[0]), ids.find(other[0]))


def test_freezing_what_two_ids_make_freezes_both():
    ids = Ids()
    left, right = ids.new(1), ids.new(1)
    ids.freeze(ids.compose(left, right), "whole")
    assert ids.reason(int(left[0])) == ids.reason(int(right[0])) == "whole"


def test_an_id_that_would_hold_itself_is_frozen_with_its_parts():
    ids = Ids()
    left, right = ids.new(1), ids.new(1)
    ids.union(ids.compose(left, right), left)
    assert all(ids.reason(int(r)) for r in ids.find(np.concatenate([left, right])))

    older, left, right = ids.new(1), ids.new(1), ids.new(1)
    ids.union(older, ids.compose(left, right))
    ids.union(older, left)
    assert all(ids.reason(int(r)) for r in ids.find(np.concatenate([older, left, right])))
    assert len(ids.factors(older)) == 1


def test_concatenated_axes_are_taken_apart_at_the_same_places():
    ids = Ids()
    outer, inner = ids.new(2), ids.new(3)
    wide = ids.join((outer,), 2, (inner,), 3)
    plain = (ids.new(4),)
    whole = concatenated([(wide, 6), ((), 2), (plain, 4)])
    assert [len(array) for array in whole] == [12, 12]
    assert np.array_equal(taken(whole, slice(8, 12))[0], plain[0])
    assert all((array[6:8] == NONE).all() for array in whole)

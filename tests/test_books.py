"""The host's books: who has which pages."""

import numpy as np
import pytest

from rlvd_jax.sampling.books import Group, Plan, Pool


def test_pool():
    pool = Pool(5)
    first = pool.take(3)
    assert sorted([*first, *pool.free]) == [0, 1, 2, 3, 4]
    pool.give(first[:1])
    assert pool.left == 3 and first[0] in pool.free and first[1] not in pool.free
    with pytest.raises(AssertionError):
        pool.take(4)


@pytest.fixture
def group():
    """Four slots, 12 pages of 4 positions, of which none is reserved."""
    return Group(Plan(slots=4, length=40, pages=12), 4, 10)


def begin(group, slot, request, cached, limit=100):
    pages = group.share(request, cached, alone=True)
    return pages, group.begin(slot, request, 0, cached, limit)


def test_samples_share_the_whole_pages_of_a_prompt(group):
    pages, page = begin(group, 0, 7, cached=9)
    assert len(pages) == 2 and page is not None and page not in pages
    again, other = begin(group, 1, 7, cached=9)
    assert len(again) == 0 and other not in (page, *pages)
    np.testing.assert_array_equal(group.table[0, :3], [*pages, page])
    np.testing.assert_array_equal(group.table[1, :3], [*pages, other])
    assert group.pool.left == 8
    assert begin(group, 2, 8, cached=8)[1] is None, "a prompt that ends with a page leaves nothing to copy"
    assert group.pool.left == 6
    group.end(0)
    assert group.pool.left == 7
    group.end(1)
    group.end(2)
    assert group.pool.left == 12 and not group.live.any()


def test_pages_come_as_responses_grow(group):
    begin(group, 0, 1, cached=3, limit=6)
    assert group.grow(2) == (2, [])
    assert group.held[0] == 2, "positions 0 to 4"
    assert group.grow(100) == (100, [])
    assert group.held[0] == 3, "up to the limit, 9 positions"
    assert len(set(group.table[0, :3])) == 3


def test_the_youngest_give_way(group):
    for slot, produced in enumerate((9, 2, 5)):
        begin(group, slot, slot, cached=3)
        group.produced[slot] = produced
    steps, given_up = group.grow(32)
    assert steps == 4 and given_up == [], "fewer steps come first"
    assert group.held.tolist() == [4, 3, 3, 0] and group.pool.left == 2
    group.produced[:3] += 4
    steps, given_up = group.grow(4)
    assert (steps, given_up) == (4, [1])
    assert list(group.waiting) == [(1, range(1))] and group.live.tolist() == [True, False, True, False]
    assert group.reserve > 0, "new responses leave more from now on"
    assert group.pool.left + group.held.sum() == 12
    for _ in range(3):
        assert group.grow(1)[1] == []
    assert group.reserve == 0, "but not for ever"


def test_what_waits_keeps_no_pages(group):
    begin(group, 0, 1, cached=8)
    group.waiting.append((1, range(1, 3)))
    group.end(0)
    assert group.pool.left == 12
    pages, _ = begin(group, 0, 1, cached=8)
    assert len(pages) == 2, "to be copied again"


def test_a_reserve_is_left_to_others(group):
    group.reserve = 4
    assert group.has_room(cached=0, ahead=32) and not group.has_room(cached=0, ahead=36)
    assert group.share(1, 36, alone=False) is None
    assert len(group.share(1, 36, alone=True)) == 9


def test_fewer_slots(group):
    for slot in (1, 3):
        begin(group, slot, slot, cached=5)
    table = group.table[3].copy()
    group.keep(np.array([3]), 2)
    assert group.occupant[:, 0].tolist() == [3, -1]
    np.testing.assert_array_equal(group.table[0], table)

"What would bore a reader of nbs/api/04a_batches.ipynb: properties over random lengths, and the stability of the order."

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from truthgpt_nb.batches import best_fit, make_plan, shuffled

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=80)


def naive_best_fit(lengths, capacity):
    "Best fit decreasing as one would write it down."
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@given(LENGTHS, st.integers(50, 120))
def test_it_packs_as_tightly_as_the_plain_algorithm(lengths, capacity):
    rows = best_fit(lengths, capacity)
    assert Counter(i for row in rows for i in row) == Counter(range(len(lengths)))
    sums = sorted(sum(lengths[i] for i in row) for row in rows)
    assert sums[-1] <= capacity
    assert sums == sorted(map(sum, naive_best_fit(lengths, capacity)))


@settings(deadline=None)
@given(
    LENGTHS,
    st.none() | st.integers(50, 100),
    st.none() | st.integers(100, 400),
    st.integers(1, 9),
    st.booleans(),
    st.integers(1, 30),
    st.integers(1, 9),
    st.data(),
)
def test_each_example_once_within_the_limits_on_any_number_of_ranks(
    lengths, pack, tokens, rows, shuffle, pool, world, data
):
    plan = make_plan(lengths, pack, tokens, rows, seed=1, epoch=2, shuffle=shuffle, pool=pool)
    assert Counter(i for b in plan.batches for row in b for i in row) == Counter(range(len(lengths)))
    first = data.draw(st.integers(0, len(plan) + world))
    ranks = [plan.for_rank(rank, world, first) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = Counter(i for batches in ranks for batch in batches for row in batch for i in row)
    assert seen == Counter(i for b in plan.batches[first:] for row in b for i in row)
    for batch in [b for batches in ranks for b in batches if b]:
        sizes = [sum(lengths[i] for i in row) for row in batch]
        assert len(batch) <= rows and len(batch) * max(sizes) <= (tokens or 10**9)
        assert max(sizes) <= (pack or 50)
    if not shuffle and not pack and not tokens:
        assert [i for b in plan.batches for row in b for i in row] == list(range(len(lengths)))


def test_the_order_is_that_of_every_version_of_numpy():
    # a run that is resumed after an update must find the order that it began with
    assert shuffled(8, seed=0, epoch=0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]


def test_all_places_are_equally_likely():
    counts = np.zeros((5, 5))
    for epoch in range(2000):
        counts[np.arange(5), shuffled(5, seed=7, epoch=epoch)] += 1
    assert abs(counts - 400).max() < 90  # five standard deviations

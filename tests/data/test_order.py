"""The order is arithmetic, so its promises are checked as arithmetic: once each, equal ranks, any resume."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip.data.order import EpochOrder, Part, Plan


def part(size: int, chunk: int = 7, weight: float = 1.0) -> Part:
    return Part(size, np.arange(0, max(size, 1), chunk), weight)


sizes = st.lists(st.integers(1, 60), min_size=1, max_size=5)


def line(order: EpochOrder, plan: Plan, epoch: int = 0, position: int = 0) -> list[np.ndarray]:
    return [ticket.ids for ticket in plan.tickets(order, epoch, position)]


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 9), st.integers(1, 4), st.integers(1, 80), st.booleans(), st.integers(0, 3))
def test_each_sample_once_and_equal_batches_on_every_rank(sizes, batch, world, buffer, shuffle, epoch) -> None:
    order = EpochOrder([part(n) for n in sizes], seed=3, shuffle=shuffle, buffer=buffer)
    ranks = [line(order, Plan(batch, rank, world), epoch) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == Plan(batch, 0, world).count(len(order))
    for batches in zip(*ranks, strict=True):
        lengths = [len(ids) for ids in batches]
        assert max(lengths) <= batch and max(lengths) - min(lengths) <= 1
    seen = np.concatenate([ids for batches in ranks for ids in batches])
    assert sorted(seen) == list(range(sum(sizes)))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 20))
def test_resume_with_another_world_loses_and_doubles_nothing(sizes, batch, world, batch2, world2, done) -> None:
    order = EpochOrder([part(n) for n in sizes], seed=1, buffer=16)
    first = [list(Plan(batch, rank, world).tickets(order, 2)) for rank in range(world)]
    done = min(done, len(first[0]))
    position = first[0][done - 1].position if done else 0
    before = [ticket.ids for tickets in first for ticket in tickets[:done]]
    after = [ids for rank in range(world2) for ids in line(order, Plan(batch2, rank, world2), 2, position)]
    assert sorted(np.concatenate([*before, *after, np.zeros(0, int)])) == list(range(sum(sizes)))


def test_resume_continues_the_very_same_line() -> None:
    order, plan = EpochOrder([part(101)], seed=5, buffer=20), Plan(8)
    whole = list(plan.tickets(order, 4))
    rest = list(plan.tickets(order, 4, whole[5].position))
    assert [t.ids.tolist() for t in rest] == [t.ids.tolist() for t in whole[6:]]
    assert [t.places.tolist() for t in rest] == [t.places.tolist() for t in whole[6:]]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = EpochOrder([part(200)], seed=0, buffer=50)
    assert order.ids(0).tolist() == EpochOrder([part(200)], seed=0, buffer=50).ids(0).tolist()
    assert order.ids(0).tolist() != order.ids(1).tolist()
    assert order.ids(0).tolist() != EpochOrder([part(200)], seed=1, buffer=50).ids(0).tolist()


def test_weights_are_passes_and_fractions_rotate_through_everything() -> None:
    order = EpochOrder([part(40, weight=0.25), part(10, weight=2.5)], seed=0)
    assert len(order) == 10 + 25
    seen: list[int] = []
    for epoch in range(4):
        ids = order.ids(epoch)
        seen += ids[ids < 40].tolist()
        counts = np.bincount(ids[ids >= 40] - 40, minlength=10)
        assert counts.min() >= 2 and counts.max() == 3
    assert sorted(seen) == list(range(40))


weights = st.lists(
    st.tuples(st.integers(1, 60), st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.3, 3.0])), min_size=1, max_size=4
)


@settings(max_examples=100, deadline=None)
@given(weights, st.integers(1, 80), st.booleans(), st.integers(1, 9))
def test_weights_with_any_buffer(given, buffer, shuffle, chunk) -> None:
    """Every sample comes as often as any other, to within one, and after enough epochs each has come."""
    order = EpochOrder([part(n, chunk, w) for n, w in given], seed=2, shuffle=shuffle, buffer=buffer)
    epochs = [order.ids(epoch) for epoch in range(12)]
    assert {len(ids) for ids in epochs} == {len(order)} == {sum(round(n * w) for n, w in given)}
    total = np.bincount(np.concatenate(epochs), minlength=sum(n for n, _ in given))
    for start, (n, w) in zip(order.starts, given, strict=False):
        drawn = total[start : start + n]
        assert drawn.max() - drawn.min() <= 1
        assert drawn.sum() == 12 * round(n * w)


def test_shards_written_concept_by_concept_come_out_mixed() -> None:
    """40 shards of 100, one concept each: a plain buffer of 200 sees 2-3 concepts a batch, chunk mixing tens."""
    order = EpochOrder([Part(4000, np.arange(0, 4000, 10))], seed=0, buffer=200)
    concepts = [len(set(ids // 100)) for ids in line(order, Plan(64))]
    in_file_order = np.argsort(np.arange(4000) + np.random.default_rng(0).uniform(0, 200, 4000))
    plain = [len(set(in_file_order[i : i + 64] // 100)) for i in range(0, 4000 - 64, 64)]
    assert np.mean(plain) < 5
    assert np.mean(concepts) > 15


def test_buffer_bounds_how_far_a_chunk_spreads() -> None:
    """What a remote read relies on: a chunk's samples come within buffer + chunk places of each other."""
    order = EpochOrder([Part(10_000, np.arange(0, 10_000, 50))], seed=2, buffer=500)
    place = np.argsort(order.ids(1))
    spread = place.reshape(200, 50).max(1) - place.reshape(200, 50).min(1)
    assert spread.max() <= 500 + 2 * 50
    assert np.median(spread) > 300  # and is not left in a row either


def test_drop_last_and_empty() -> None:
    order = EpochOrder([part(21)], seed=0)
    assert [len(ids) for ids in line(order, Plan(4, drop_last=True))] == [4] * 5
    assert Plan(4, drop_last=True).count(21) == 5
    assert EpochOrder([part(0)], seed=0).ids(0).tolist() == []


def test_the_first_samples_come_again_in_every_epoch() -> None:
    parts = [Part(50, np.arange(0, 50, 5)), Part(30, np.array([0]), 0.5)]
    whole, some = EpochOrder(parts, seed=3, buffer=16), EpochOrder(parts, seed=3, buffer=16, first=12)
    assert len(some) == 12
    assert all(np.array_equal(some.ids(epoch), whole.ids(0)[:12]) for epoch in range(3))
    assert len(EpochOrder(parts, seed=3, first=1000)) == len(whole) == 65

"""One slide on its way: which rows a block covers, whatever is corrupt; what is taken up of an earlier run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slides.entry import Entry
from slides.feature_work import FeatureOutput, SlideWork
from slides.features import batched
from slides.files import Busy, alone
from slides.plan import Plan
from slides.request import Request
from tests.slides.toys import toy_slide

REQUEST = Request(size=32, mpp=0.5, tissue="none", remove=(), coverage=0.0)


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    return Entry("t", str(toy_slide(tmp_path_factory.mktemp("work") / "t.svs", 400, 300).path))


def opened(entry: Entry, folder: Path, block: int = 4) -> SlideWork:
    work = SlideWork(entry, folder, "mark", FeatureOutput(str(folder), block=block))
    work.open(REQUEST)
    assert work.plan is not None
    return work


@settings(max_examples=12, deadline=None)
@given(
    corrupt=st.lists(st.booleans(), min_size=35, max_size=35),
    sizes=st.lists(st.integers(1, 9), min_size=35, max_size=35),
    stop=st.integers(0, 35),
)
def test_whatever_is_corrupt_and_wherever_it_stops_rows_keep_their_features(
    entry: Entry, tmp_path_factory: pytest.TempPathFactory, corrupt: list[bool], sizes: list[int], stop: int
) -> None:
    """Features that are their row's number arrive in pieces; the work stops, and a second one goes on."""
    folder = tmp_path_factory.mktemp("any")
    found: list[np.ndarray] = []
    for last in (stop, None):
        work = opened(entry, folder)
        assert len(work) == 35
        good = [row for row in range(work.done, 35) if not corrupt[row]]
        work.status[work.done :] = np.array(corrupt[work.done :], np.uint8)
        pieces = iter(sizes)
        while good:
            count = next(pieces)
            if last is not None and good[0] >= last:
                break
            work.take(np.array(good[:count], np.float32)[:, None])
            del good[:count]
        if last is not None:
            work.close()
            continue
        work.finish("toy", lambda plan, path, features: found.append(features))
    expected = [row for row in range(35) if not corrupt[row]]
    if expected:
        assert found[0].ravel().tolist() == expected
        assert work.row["status"] == "ok" and work.row["corrupt"] == 35 - len(expected)
    else:
        assert found == [] and work.row["status"] == "failed"


def test_a_damaged_block_is_made_anew(entry: Entry, tmp_path: Path) -> None:
    work = opened(entry, tmp_path)
    for row in range(0, 12, 4):
        work.take(np.full((4, 2), row, np.float32))
    work.close()
    blocks = sorted(work.state.glob("block-*.npz"))
    assert len(blocks) == 3
    for damage in (blocks[1].read_bytes()[:50], b"", b"PK\x03\x04" + bytes(100)):
        blocks[1].write_bytes(damage)
        work = opened(entry, tmp_path)
        assert work.done == 4  # the first block; the third does not follow
        work.close()
    (work.state / "plan.npz").write_bytes(b"damaged")
    work = opened(entry, tmp_path)
    assert work.done == 4
    work.close()


def test_blocks_of_other_settings_are_not_taken_up(entry: Entry, tmp_path: Path) -> None:
    work = opened(entry, tmp_path)
    work.take(np.zeros((4, 2), np.float32))
    work.close()
    other = SlideWork(entry, tmp_path, "other mark", FeatureOutput(str(tmp_path), block=4))
    other.open(REQUEST)
    assert other.done == 0 and not list(other.state.glob("block-*"))
    other.close()


def test_what_a_kill_left_half_written_is_swept(entry: Entry, tmp_path: Path) -> None:
    halves = [tmp_path / name for name in (".t.h5.77-ab.part", "state/.t.json.77-ab.part", ".other.h5.77-ab.part")]
    (tmp_path / "state").mkdir()
    for half in halves:
        half.touch()
    opened(entry, tmp_path).close()
    assert [half.exists() for half in halves] == [False, False, True]


def test_a_slide_in_work_is_locked_and_a_bad_one_is_not(entry: Entry, tmp_path: Path) -> None:
    work = opened(entry, tmp_path)
    with pytest.raises(Busy), alone(tmp_path / "state/t.lock"):
        pass
    work.close()
    bad = SlideWork(Entry("bad", "/nowhere/bad.svs"), tmp_path, "mark", FeatureOutput(str(tmp_path)))
    bad.open(REQUEST)
    assert bad.row["status"] == "failed" and len(bad) == 0 and list(bad.read(REQUEST, 1)) == []
    with alone(tmp_path / "state/bad.lock"):
        pass


class Owner:
    def __init__(self, number: int) -> None:
        self.number = number


@given(counts=st.lists(st.lists(st.integers(0, 7), max_size=4), max_size=6), size=st.integers(1, 10))
def test_batches_are_full_and_every_patch_keeps_its_owner(counts: list[list[int]], size: int) -> None:
    owners = [Owner(number) for number in range(len(counts))]

    def chunks():
        for owner, pieces in zip(owners, counts, strict=True):
            first = 0
            for piece in pieces:
                patches = np.zeros((piece, 1, 1, 3), np.uint8)
                patches[:, 0, 0, 0], patches[:, 0, 0, 1] = owner.number, np.arange(first, first + piece)
                first += piece
                yield owner, patches, False
            yield owner, np.zeros((0, 1, 1, 3), np.uint8), True

    got: dict[int, list[int]] = {owner.number: [] for owner in owners}
    ended: list[int] = []
    lengths = []
    for batch, shares in batched(chunks(), size):  # type: ignore[arg-type]
        if len(batch):
            lengths.append(len(batch))
        place = 0
        for owner, count, last in shares:
            part = batch[place : place + count, 0, 0]
            assert owner.number not in ended and (part[:, 0] == owner.number).all()
            got[owner.number] += part[:, 1].tolist()
            place += count
            if last:
                ended.append(owner.number)
        assert place == len(batch)
    total = sum(map(sum, counts))
    assert lengths == [size] * (total // size) + ([total % size] if total % size else [])
    assert got == {number: list(range(sum(pieces))) for number, pieces in enumerate(counts)}
    assert sorted(ended) == sorted(got)


def test_a_plan_is_taken_up_without_looking_at_the_slide_again(entry: Entry, tmp_path: Path) -> None:
    work = opened(entry, tmp_path)
    saved = Plan.load(work.state / "plan.npz")
    work.close()
    assert saved is not None and work.plan is not None and np.array_equal(saved.coords, work.plan.coords)

"""The downsample of a level and the choice of one, against the ways in which scanners round."""

from __future__ import annotations

from pathlib import Path

import openslide
from hypothesis import given
from hypothesis import strategies as st

from slides.levels import best_level, exact_downsample
from slides.open import open_slide
from tests.slides.toys import toy_slide


@given(st.integers(2, 70), st.data())
def test_a_whole_downsample_is_found_however_each_side_was_rounded(n: int, data: st.DataObject) -> None:
    """From 2 n (n + 1) pixels on, no other n explains the sides: w / n and w / (n + 1) are two apart."""
    sides = st.integers(2 * n * (n + 1), 200_000)
    size0 = (data.draw(sides), data.draw(sides))
    up = [data.draw(st.booleans()) for _ in size0]
    size = tuple(side // n + (side % n > 0) * u for side, u in zip(size0, up, strict=True))
    assert exact_downsample(size0, (size[0], size[1])) == n


@given(st.integers(0, 6), st.integers(8, 100_000), st.integers(8, 100_000), st.sampled_from(["down", "near", "up"]))
def test_levels_halved_again_and_again_are_powers_of_two(times: int, width: int, height: int, how: str) -> None:
    add = {"down": 0, "near": 1, "up": 1}[how]
    w, h = width, height
    for _ in range(times):
        w, h = (w + add) // 2, (h + add) // 2
    if min(w, h) >= 4:  # of a thumbnail of three pixels nobody can tell
        assert exact_downsample((width, height), (w, h)) == 2**times


def test_a_level_that_was_rounded_up_is_not_truncated_to_the_next_smaller() -> None:
    """A peer takes int(3.9993) = 3 and reads a third too much; openslide's own number is off likewise."""
    assert int(15_997 / 4_000) == 3
    assert exact_downsample((15_997, 15_997), (4_000, 4_000)) == 4.0


def test_openslide_is_off_where_we_are_not(tmp_path: Path) -> None:
    for rounding in ("floor", "ceil"):
        toy = toy_slide(tmp_path / f"{rounding}.svs", 1001, 803, rounding=rounding)
        with openslide.OpenSlide(toy.path) as theirs, open_slide(toy.path) as ours:
            assert [level.downsample for level in ours.levels] == [1, 4, 16]
            assert all(own != d for own, d in zip(theirs.level_downsamples[1:], (4, 16), strict=True))


def test_what_is_no_whole_number_stays_as_it_is() -> None:
    assert exact_downsample((10_000, 8_000), (4_000, 3_200)) == 2.5
    assert exact_downsample((10_000, 8_000), (4_000, 3_201)) == (2.5 + 8_000 / 3_201) / 2
    assert exact_downsample((17, 23), (17, 23)) == 1


@given(st.lists(st.floats(1, 64), min_size=1, max_size=6, unique=True), st.floats(0.1, 100))
def test_the_coarsest_level_that_is_fine_enough(rest: list[float], wanted: float) -> None:
    downsamples = [1.0, *sorted(rest)]
    chosen = best_level(downsamples, wanted)
    assert downsamples[chosen] <= max(1.0, wanted * 1.001)
    assert not any(downsamples[chosen] < d <= wanted for d in downsamples)


def test_a_thousandth_is_no_reason_to_read_four_times_as_much() -> None:
    assert best_level([1, 4.003, 16], 4.0) == 1
    assert best_level([1, 4.01, 16], 4.0) == 0
    assert best_level([2.0, 4.0], 1.0) == 0  # nothing is fine enough

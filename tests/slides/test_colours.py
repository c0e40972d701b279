"""Profiles and stains on patches: what `slides.icc` and `slides.stain` do, once a slide, to every patch alike."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest

from slides.colours import recolour
from slides.errors import SlideError
from slides.icc import Profile
from slides.open import open_slide
from slides.plan import Plan, make_plan
from slides.pyramid import LOSSLESS
from slides.reader import Slide
from slides.request import Request
from slides.stain.reinhard import Reinhard
from tests.slides.runs import REQUEST, extract
from tests.slides.test_icc import matrix_profile
from tests.slides.toys import break_header, toy_slide

SWAP = matrix_profile(gamma=1.8)


def arrays(path: Path, out: Path, request: Request) -> np.ndarray:
    (row,) = extract([path], out, replace(request, exact=True), save=("arrays",))
    assert row["status"] == "ok", row
    with h5py.File(out / f"arrays/{path.stem}.h5") as file:
        return file["imgs"][:]  # type: ignore[index,return-value]


def target(tmp_path: Path, seed: int = 9) -> str:
    toy = toy_slide(tmp_path / "target.svs", 600, 500, seed=seed)
    bluer = np.clip(toy.pixels.astype(int) + np.where(toy.tissue[..., None], (-60, -10, 20), 0), 0, 255)
    cv2.imwrite(str(tmp_path / "target.png"), bluer.astype(np.uint8)[..., ::-1])
    return str(tmp_path / "target.png")


def test_the_profile_is_applied_to_every_patch(tmp_path: Path) -> None:
    path = toy_slide(tmp_path / "t.svs", 800, 700, icc=SWAP, encoding=LOSSLESS).path
    plain = arrays(path, tmp_path / "plain", REQUEST)
    changed = arrays(path, tmp_path / "icc", replace(REQUEST, icc=True))
    assert np.array_equal(changed, Profile(SWAP).to_srgb(plain))
    assert np.abs(changed.astype(int) - plain).mean() > 3


def test_a_slide_without_a_profile_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = toy_slide(tmp_path / "t.svs", 600, 500).path
    with caplog.at_level(logging.INFO):
        changed = arrays(path, tmp_path / "icc", replace(REQUEST, icc=True))
    assert np.array_equal(changed, arrays(path, tmp_path / "plain", REQUEST))
    assert "t.svs: has no colour profile" in caplog.text


def opened(path: Path, **options: Any) -> tuple[Slide, Plan, Request]:
    request = replace(REQUEST, **options)
    slide = open_slide(path)
    return slide, make_plan(slide, path.stem, request)[0], request


@pytest.mark.parametrize("method", ["macenko", "reinhard", "vahadane"])
def test_the_stain_is_changed_by_one_function_a_slide(tmp_path: Path, method: str) -> None:
    path = toy_slide(tmp_path / "t.svs", 800, 700).path
    slide, plan, request = opened(path, stain=method, stain_target=target(tmp_path))
    with slide:
        change = recolour(slide, request, plan)
    assert change is not None
    plain = arrays(path, tmp_path / "plain", REQUEST)
    changed = arrays(path, tmp_path / "stain", request)
    assert np.array_equal(changed, change(plain))
    assert np.array_equal(changed[3], change(plain[3]))  # a patch alone is not changed in another way
    assert np.abs(changed.astype(int) - plain).mean() > 3


def test_reinhard_s_means_and_spreads_become_the_target_s(tmp_path: Path) -> None:
    """Its definition, on all patches together, within what a sample of them and clipping cost."""
    path = toy_slide(tmp_path / "t.svs", 800, 700, mpp=2.0).path
    request = replace(REQUEST, mpp=2.0, stain="reinhard", stain_target=target(tmp_path), coverage=0.99)
    changed = arrays(path, tmp_path / "stain", request)
    wanted = Reinhard().estimate(cv2.imread(request.stain_target or "")[..., ::-1])
    before, after = (
        Reinhard().estimate(arrays(path, tmp_path / "p", replace(REQUEST, mpp=2.0))),
        Reinhard().estimate(changed),
    )
    assert (
        np.abs(np.subtract(after.mean, wanted.mean)).max() < 0.25 * np.abs(np.subtract(before.mean, wanted.mean)).max()
    )


def test_corrupt_patches_are_no_sample_of_the_stain(tmp_path: Path) -> None:
    path = toy_slide(tmp_path / "t.svs", 800, 700, downsamples=(1, 4)).path
    slide, plan, request = opened(path, stain="reinhard", stain_target=target(tmp_path), mpp=0.25)
    patch = np.random.default_rng(0).integers(80, 200, (64, 64, 3), np.uint8)
    with slide:
        whole = recolour(slide, request, plan)
    break_header(path, column=1, row=1)
    with open_slide(path) as slide:
        partly = recolour(slide, request, plan)
    assert whole is not None and partly is not None
    assert np.abs(whole(patch).astype(int) - partly(patch)).mean() < 12  # blackness or white would drag it far away


def test_profile_goes_before_stain(tmp_path: Path) -> None:
    path = toy_slide(tmp_path / "t.svs", 800, 700, icc=SWAP).path
    slide, plan, request = opened(path, stain="reinhard", stain_target=target(tmp_path), icc=True)
    with slide:
        both = recolour(slide, request, plan)
        profile = recolour(slide, replace(request, stain=None), plan)
        stain = recolour(slide, replace(request, icc=False), plan)
    assert both is not None and profile is not None and stain is not None
    patch = arrays(path, tmp_path / "plain", REQUEST)[2]
    # Reinhard takes the profile's shift out again: the two ends are nearer to each other than their middles are.
    ends = np.abs(both(patch).astype(int) - stain(patch)).mean()
    assert ends < 0.7 * np.abs(profile(patch).astype(int) - patch).mean()


def test_nothing_asked_for_is_nothing_done(tmp_path: Path) -> None:
    slide, plan, request = opened(toy_slide(tmp_path / "t.svs", 600, 500).path)
    with slide:
        assert recolour(slide, request, plan) is None


def test_a_target_that_cannot_be_read_is_a_failed_row(tmp_path: Path) -> None:
    path = toy_slide(tmp_path / "t.svs", 600, 500).path
    for name, content in (("gone.png", None), ("text.png", "no image")):
        if content:
            (tmp_path / name).write_text(content)
        request = replace(REQUEST, stain="macenko", stain_target=str(tmp_path / name))
        (row,) = extract([path], tmp_path / f"out-{name}", request, save=("arrays",))
        assert row["status"] == "failed" and name in row["reason"] and "\n" not in row["reason"]
    cv2.imwrite(str(tmp_path / "white.png"), np.full((200, 200, 3), 255, np.uint8))
    slide, plan, request = opened(path, stain="macenko", stain_target=str(tmp_path / "white.png"))
    with slide, pytest.raises(SlideError, match=r"^t\.svs: "):
        recolour(slide, request, plan)

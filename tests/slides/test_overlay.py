from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from slides.errors import SlideError
from slides.overlay import draw, save_jpeg

GREEN, RED = (0, 160, 80), (220, 0, 0)
WHITE = np.full((400, 600, 3), 240, np.uint8)


def disc(size: tuple[int, int] = (400, 600), scale: float = 1.0) -> np.ndarray:
    image = np.zeros(size, np.uint8)
    cv2.circle(image, (round(300 * scale), round(200 * scale)), round(100 * scale), 1, -1)
    return image > 0


def near(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(image.astype(int) - colour).max(-1) < 30).nonzero()


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1])
def test_outline_lies_on_the_edge_and_the_tint_inside(scale: float) -> None:
    """Of a mask at any resolution: within one and a half of its pixels."""
    array = disc((round(400 * scale), round(600 * scale)), scale)
    out = draw(WHITE, [(array, GREEN)])
    y, x = near(out, GREEN)
    radius = np.hypot(x - 300, y - 200)
    assert len(radius) > 200 and np.abs(radius - 100).max() < 1.5 / scale + 2
    # All the way around: each tenth of the circle has its part.
    turns = np.histogram(np.arctan2(y - 200, x - 300), 10, (-np.pi, np.pi))[0]
    assert turns.min() > 8
    np.testing.assert_allclose(out[200, 300], 0.85 * 240 + 0.15 * np.array(GREEN), atol=1)
    np.testing.assert_array_equal(out[20, 20], WHITE[20, 20])


def test_the_image_is_left_alone_and_nothing_drawn_is_the_image() -> None:
    before = WHITE.copy()
    np.testing.assert_array_equal(draw(WHITE), before)
    np.testing.assert_array_equal(
        draw(WHITE, [(np.zeros((40, 60), bool), RED)], coords=np.empty((0, 2)), side=9), before
    )
    draw(WHITE, [(disc(), RED)], coords=np.array([[0, 0]]), side=50, legend=["x"])
    np.testing.assert_array_equal(WHITE, before)


def test_later_masks_lie_on_top() -> None:
    out = draw(WHITE, [(disc(), GREEN), (disc(), RED)])
    assert len(near(out, GREEN)[0]) == 0 and len(near(out, RED)[0]) > 200


def test_squares_are_drawn_where_the_patches_are() -> None:
    """Level-0 squares of 512 at downsample 8 are 64 pixels; their lines are thin and lie on the edges."""
    coords = np.array([[800, 800], [1312, 800], [2400, 1600]])
    out = draw(WHITE, coords=coords, side=512, downsample=8)
    changed = (out != WHITE).any(-1)
    for x, y in coords / 8:
        ring = np.zeros_like(changed)
        cv2.rectangle(ring.view(np.uint8), (round(x) - 1, round(y) - 1), (round(x) + 64, round(y) + 64), 1, 3)
        assert changed[ring].mean() > 0.3
        assert not changed[round(y) + 3 : round(y) + 61, round(x) + 3 : round(x) + 61].any()
    assert changed.sum() < 4 * 64 * 3 * 3
    assert not changed[:90].any() and not changed[:, 400:].any()


def test_a_dense_grid_is_a_tint_not_a_black_plate() -> None:
    y, x = np.mgrid[100:300:2, 100:300:2]
    out = draw(WHITE, coords=np.stack([x.ravel(), y.ravel()], 1), side=2, grid_color=(0, 0, 0))
    assert 100 < out[150:250, 150:250].mean() < 200


def test_legend_has_a_line_and_a_key_for_each() -> None:
    plain = draw(WHITE, [(disc(), GREEN), (disc(), RED)], coords=np.array([[500, 300]]), side=40)
    out = draw(
        WHITE,
        [(disc(), GREEN), (disc(), RED)],
        coords=np.array([[500, 300]]),
        side=40,
        legend=["tissue", "", "12 patches"],
    )
    changed = (out != plain).any(-1)
    assert changed[:100, :200].any() and not changed[200:].any() and not changed[:, 400:].any()
    corner = out[:100, :60]
    assert len(near(corner, GREEN)[0]) > 40 and len(near(corner, (40, 40, 40))[0]) > 40
    assert len(near(corner, RED)[0]) == 0  # its text is empty


@pytest.mark.parametrize("shape", [(1, 1, 3), (8, 8, 3), (3, 500, 3)])
def test_tiny_images(shape: tuple[int, int, int]) -> None:
    image = np.full(shape, 200, np.uint8)
    out = draw(image, [(np.ones((2, 2), bool), RED)], coords=np.array([[0, 0]]), side=4, legend=["tissue", "patches"])
    assert out.shape == shape and (out != image).any()


def test_jpeg_is_whole_or_not_there(tmp_path: Path) -> None:
    out = draw(WHITE, [(disc(), RED)])
    save_jpeg(tmp_path / "a b é.jpg", out)
    again = np.asarray(Image.open(tmp_path / "a b é.jpg").convert("RGB"))
    assert np.abs(again.astype(int) - out).mean() < 1
    (tmp_path / "taken.jpg").mkdir()
    with pytest.raises(SlideError, match=r"cannot write .*taken\.jpg"):
        save_jpeg(tmp_path / "taken.jpg", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b é.jpg", "taken.jpg"]

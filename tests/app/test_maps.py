from __future__ import annotations

import cv2
import numpy as np
import torch

from medclip.app.features import Bag
from medclip.app.maps import Wanted, attention_map, text_map
from medclip.models.mil import MilPrediction
from slides.heat_colours import make_scale


def bag_of(features: np.ndarray, coords: np.ndarray) -> Bag:
    whole = torch.from_numpy(features).half()
    return Bag(whole, whole.float().norm(dim=1), coords, 100.0)


COORDS = np.array([[200, 100], [300, 100], [200, 200], [500, 400]])  # of 1000 x 800; gaps between
FEATURES = np.array([[1.0, 0], [0, 2], [3, 3], [-1, 0]], np.float32)
E0, E1 = torch.eye(2)


def test_values_are_cosines_and_a_difference_is_theirs() -> None:
    bag = bag_of(FEATURES, COORDS)
    one = text_map(Wanted("a", "m", "x"), bag, (1000, 800), E0, None)
    np.testing.assert_allclose(one.values, [1, 0, 0.5**0.5, -1], atol=1e-3)
    two = text_map(Wanted("a", "m", "x", "y"), bag, (1000, 800), E0, E1)
    np.testing.assert_allclose(two.values, [1, -1, 0, -1], atol=1e-3)
    about = two.about()
    assert about["low"] == -about["high"] and about["title"] == "x − y"


def test_the_overlay_lies_where_the_patches_are_in_their_colours() -> None:
    found = text_map(Wanted("a", "m", "x"), bag_of(FEATURES, COORDS), (1000, 800), E0, None)
    about = found.about()
    np.testing.assert_allclose([about[key] for key in ("x", "y", "width", "height")], [200, 100, 400, 400])
    png = cv2.imdecode(np.frombuffer(found.overlay(), np.uint8), cv2.IMREAD_UNCHANGED)
    assert png.shape[0] == png.shape[1]
    scale, pixel = make_scale(found.values), about["width"] / png.shape[1]
    for (x, y), value in zip(COORDS, found.values, strict=True):
        inside = png[int((y + 50 - about["y"]) / pixel), int((x + 50 - about["x"]) / pixel)]
        assert inside[3] == 255 and (inside[2::-1] == scale.colour(value)).all()
    for x, y in ((350, 250), (550, 150)):  # between patches
        assert png[int((y - about["y"]) / pixel), int((x - about["x"]) / pixel), 3] == 0
    assert about["stops"][0] == "#440154" and about["stops"][-1] == "#fde725"  # viridis


class Even:
    """A slide model that looks everywhere alike with one branch, and at the first patch with another."""

    dim, encoder, target = 2, "tiny", "classes"

    def __init__(self, branches: int) -> None:
        self.branches, self.classes = branches, ["benign", "malignant"]

    def predict(self, bag: torch.Tensor, real: torch.Tensor | None = None) -> MilPrediction:
        attention = torch.full((1, self.branches, bag.shape[1]), 1 / bag.shape[1])
        if self.branches == 2:
            attention[0, 1] = torch.eye(bag.shape[1])[0]
        return MilPrediction(torch.tensor([[0.25, 0.75]]), attention, torch.zeros(1, 1))


def test_attention_is_told_in_even_shares() -> None:
    bag = bag_of(FEATURES, COORDS)
    even = attention_map(Wanted("a", "mil"), bag, (1000, 800), Even(1))
    np.testing.assert_allclose(even.values, [1, 1, 1, 1])
    assert even.outcome == {"benign": 0.25, "malignant": 0.75}
    assert even.overlay()  # all alike: still a picture
    both = attention_map(Wanted("a", "mil"), bag, (1000, 800), Even(2))
    np.testing.assert_allclose(both.values, [2.5, 0.5, 0.5, 0.5])  # the mean of (4, 0, 0, 0) and ones

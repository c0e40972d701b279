"""A cohort to one slide's colours."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from slides.stain.macenko import Macenko
from slides.stain.normalise import Normaliser
from slides.stain.reinhard import Reinhard
from slides.stain.vahadane import Vahadane
from tests.slides.stain.tissue_toys import tissue


@pytest.mark.parametrize("method", [Macenko(), Vahadane(), Reinhard()], ids=["macenko", "vahadane", "reinhard"])
def test_two_slides_of_one_tissue_look_alike_after_it(method: Macenko | Vahadane | Reinhard) -> None:
    # The same concentrations (one seed) under two pairs of stains: the truth is a pixel-by-pixel match. Reinhard moves
    # a cloud of colours, not stains, and comes less close.
    ours, _, _ = tissue("ruifrok", n=40_000, glass=0.3, noise=0)
    wanted, _, _ = tissue("veta", n=40_000, glass=0.3, noise=0)
    change = Normaliser.fit(method, wanted).slide(ours)
    before = np.abs(ours.astype(int) - wanted).mean()
    after = np.abs(change(ours).astype(int) - wanted).mean()
    assert after < (0.5 if isinstance(method, Reinhard) else 0.25) * before


def test_every_patch_of_a_slide_is_changed_alike() -> None:
    pixels, _, _ = tissue("bluish", n=40_000)
    slide = pixels.reshape(200, 200, 3)
    change = Normaliser.fit(Macenko(), tissue("veta")[0]).slide(slide)
    whole = change(slide)
    patches = change(np.stack([slide[:100, :100], slide[100:, 100:]]))
    assert (patches[0] == whole[:100, :100]).all() and (patches[1] == whole[100:, 100:]).all()
    # It goes to reader processes as it is.
    assert (pickle.loads(pickle.dumps(change))(slide) == whole).all()

"""Vahadane's estimate against known stains, and its solver against scikit-learn's and SciPy's."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.decomposition import DictionaryLearning, sparse_encode

from slides.errors import SlideError
from slides.stain.od import density
from slides.stain.stains import REFERENCE
from slides.stain.vahadane import Vahadane, dictionary, sparse_codes
from tests.slides.stain.tissue_toys import PAIRS, angles, tissue, unit

DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.mark.parametrize("glass", [0.0, 0.9])
@pytest.mark.parametrize("pair", PAIRS)
def test_known_vectors_and_amounts_are_found_among_glass(pair: str, glass: float) -> None:
    pixels, truth, amounts = tissue(pair, glass=glass)
    stains = Vahadane(sparsity=0.05).estimate(pixels)
    assert angles(stains.matrix, truth).max() < 2.0
    assert np.allclose(stains.top, np.percentile(amounts, 99, axis=0), rtol=0.08)


def test_tinted_glass_is_no_stain_once_it_is_measured() -> None:
    glass = (250, 240, 190)
    pixels, truth, _ = tissue("veta", white=glass)
    method = Vahadane(sparsity=0.02, white=glass)
    stains = method.estimate(pixels)
    assert angles(stains.matrix, truth).max() < 2.0
    moved = method.transfer(np.array([[glass]], np.uint8), stains, REFERENCE)
    assert (moved == 240).all()  # the target's glass


def test_what_is_left_of_the_error_is_the_penaltys() -> None:
    pixels, truth, _ = tissue("ruifrok")
    errors = [angles(Vahadane(sparsity=s).estimate(pixels).matrix, truth).max() for s in (0.2, 0.1, 0.05, 0.01)]
    assert errors == sorted(errors, reverse=True) and errors[1] < 2.5 and errors[-1] < 1.0


@given(st.integers(0, 10**6), st.floats(0.0, 0.5))
@settings(max_examples=40, deadline=None)
def test_codes_are_scikit_learns(seed: int, sparsity: float) -> None:
    rng = np.random.default_rng(seed)
    atoms = unit(rng.uniform(0, 1, (2, 3)))
    od = rng.normal(0.4, 0.6, (30, 3))
    ours = sparse_codes(od, atoms, sparsity)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = sparse_encode(od, atoms, algorithm="lasso_cd", alpha=sparsity, positive=True, max_iter=5000)

    def cost(codes: np.ndarray) -> np.ndarray:
        return 0.5 * ((od - codes @ atoms) ** 2).sum(1) + sparsity * codes.sum(1)

    assert (ours >= 0).all() and (cost(ours) <= cost(theirs) + 1e-9).all()
    if angles(atoms[:1], atoms[1:])[0] > 5:  # nearly the same atoms: coordinate descent has not arrived
        assert np.allclose(ours, theirs, atol=0.01)


def test_codes_without_a_penalty_are_scipys_nnls() -> None:
    rng = np.random.default_rng(0)
    atoms, od = unit(PAIRS["veta"]), rng.normal(0.3, 0.5, (100, 3))
    assert np.allclose(sparse_codes(od, atoms, 0.0), [nnls(atoms.T, row)[0] for row in od])


def test_the_atoms_are_scikit_learns() -> None:
    pixels, _, _ = tissue("imagej", glass=0.0, n=400)
    od = density(pixels).astype(np.float64)
    start = unit(PAIRS["ruifrok"])
    peer = DictionaryLearning(
        2,
        alpha=0.1,  # pyright: ignore[reportArgumentType]
        max_iter=300,
        tol=1e-9,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        positive_code=True,
        positive_dict=True,
        code_init=sparse_codes(od, start, 0.1),
        dict_init=start,
        random_state=0,
    ).fit(od)
    assert angles(dictionary(od, 0.1), peer.components_).max() < 0.2


def test_a_slide_keeps_its_own_colours_and_glass_becomes_white() -> None:
    method = Vahadane(sparsity=0.02)
    pixels, _, _ = tissue("ruifrok", noise=0.0)
    stains = method.estimate(pixels)
    change = np.abs(method.transfer(pixels, stains, stains).astype(int) - pixels)
    assert change.mean() < 1 and np.percentile(change, 99) <= 5
    bright = np.array([[[250, 252, 251]]], np.uint8)
    assert (method.transfer(bright, stains, stains) == 240).all()


def test_a_slide_gets_the_targets_stains_over_blocks_and_batches() -> None:
    method = Vahadane(sparsity=0.02)
    pixels, _, _ = tissue("bluish")
    stains = method.estimate(pixels)
    moved = method.transfer(pixels.reshape(10, 100, 100, 3), stains, REFERENCE)  # two blocks
    assert (
        moved.shape == (10, 100, 100, 3) and (moved[9, 99] == method.transfer(pixels[-100:], stains, REFERENCE)).all()
    )
    found = method.estimate(moved)
    assert angles(found.matrix, REFERENCE.matrix).max() < 2.5 and np.allclose(found.top, REFERENCE.top, rtol=0.08)


def test_the_estimate_is_the_same_each_time() -> None:
    pixels, _, _ = tissue("veta", n=300_000)  # more than are looked at
    first, second = (Vahadane().estimate(pixels) for _ in range(2))
    assert (first.matrix == second.matrix).all() and (first.top == second.top).all()


@pytest.mark.parametrize(
    "image",
    [
        np.full((100, 100, 3), (120, 60, 140), np.uint8),
        np.repeat(np.random.default_rng(0).integers(20, 200, (100, 100, 1)), 3, 2).astype(np.uint8),
        np.zeros((50, 50, 3), np.uint8),
    ],
    ids=["constant", "grey", "black"],
)
def test_one_colour_is_one_line(image: np.ndarray) -> None:
    with pytest.raises(SlideError, match=r"one colour only|hardly any") as error:
        Vahadane().estimate(image)
    assert "\n" not in str(error.value)


def test_settings_out_of_range_are_one_line() -> None:
    with pytest.raises(SlideError, match="sparsity"):
        Vahadane(sparsity=float("nan"))


@pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not beside the checkout")
def test_real_tissue_beside_staintools() -> None:
    import openslide

    with openslide.OpenSlide(DATA / "wsi" / "CMU-1-Small-Region.svs") as slide:
        image = np.asarray(slide.read_region((0, 0), 0, (1500, 1500)).convert("RGB"))
    # staintools 2.1.2's extractor (SPAMS trainDL, lambda 0.1, white 255, tissue where L of Lab < 0.8), same pixels.
    theirs = np.array([[0.771, 0.55, 0.32], [0.314, 0.832, 0.458]])
    assert angles(Vahadane(white=255.0).estimate(image).matrix, theirs).max() < 2.5

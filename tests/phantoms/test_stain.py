"""Beer-Lambert against the formula in double precision, and the published vectors read back from pixels."""

from __future__ import annotations

import numpy as np
import pytest

from medclip.phantoms.histology import histology_phantom
from medclip.phantoms.stain import SCANNERS, batch_vectors, scan, transmit

# Ruifrok & Johnston 2001, table of the H&E vectors, as skimage's and ImageJ's colour deconvolution carry them.
RUIFROK = np.asarray([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def degrees(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.rad2deg(np.arccos(np.clip(unit(a) @ unit(b), -1, 1))))


def densities(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 1.2, (40, 50)).astype(np.float32), rng.uniform(0, 0.8, (40, 50)).astype(np.float32)


@pytest.mark.parametrize("name", SCANNERS)
def test_light_follows_beer_and_lambert(name: str) -> None:
    scanner = SCANNERS[name]
    vectors = batch_vectors(scanner, np.random.default_rng(1))
    hematoxylin, eosin = densities()
    stains = np.stack([hematoxylin, eosin], -1).astype(np.float64)
    by_hand = np.asarray(scanner.white) * 10 ** -(stains @ vectors)
    assert np.allclose(transmit(hematoxylin, eosin, vectors, scanner), by_hand, rtol=1e-4)


def test_no_stain_is_the_white_point_and_twice_the_stain_the_square() -> None:
    scanner, vectors = SCANNERS["ruifrok"], np.asarray(SCANNERS["ruifrok"].vectors)
    zero, some = np.zeros((4, 4), np.float32), np.full((4, 4), 0.3, np.float32)
    assert np.allclose(transmit(zero, zero, vectors, scanner), scanner.white, rtol=1e-5)
    once, twice = (transmit(some * k, zero, vectors, scanner) / np.asarray(scanner.white) for k in (1, 2))
    assert np.allclose(once**2, twice, rtol=1e-4)


def test_pure_stains_have_the_published_colours() -> None:
    scanner = SCANNERS["ruifrok"]
    zero, some = np.zeros((8, 8), np.float32), np.full((8, 8), 0.6, np.float32)
    for stain, published in enumerate(RUIFROK):
        pair = (some, zero) if stain == 0 else (zero, some)
        picture = scan(transmit(*pair, np.asarray(scanner.vectors), scanner), scanner, zero)
        od = -np.log10(picture[0, 0] / np.asarray(scanner.white))
        assert degrees(od, published) < 0.7  # eight bits


@pytest.mark.parametrize("name", SCANNERS)
def test_unmixing_gives_the_densities_back_whatever_the_gamma(name: str) -> None:
    scanner = SCANNERS[name]
    vectors = batch_vectors(scanner, np.random.default_rng(2))
    hematoxylin, eosin = densities(3)
    picture = scan(transmit(hematoxylin, eosin, vectors, scanner), scanner, np.zeros((40, 50), np.float32))
    od = -np.log10(np.maximum(picture, 1) / np.asarray(scanner.white)) / scanner.gamma  # gamma scales all ODs alike
    found = od.reshape(-1, 3) @ np.linalg.pinv(vectors)
    truth = np.stack([hematoxylin.ravel(), eosin.ravel()], 1)
    assert np.abs(found - truth).mean() < 0.012  # eight bits, the darkest pixels included
    assert np.corrcoef(found[:, 0], truth[:, 0])[0, 1] > 0.999


def test_a_staining_batch_turns_the_vectors_by_a_degree_or_two() -> None:
    for scanner in SCANNERS.values():
        turns = []
        for seed in range(200):
            vectors = batch_vectors(scanner, np.random.default_rng(seed))
            assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
            turns += [degrees(v, np.asarray(p)) for v, p in zip(vectors, scanner.vectors, strict=True)]
        assert 0.8 < np.mean(turns) < 2.5 and max(turns) < 8


def test_sensor_noise_has_the_scanners_strength() -> None:
    noise = np.random.default_rng(0).standard_normal((200, 200)).astype(np.float32)
    grey = np.full((200, 200, 3), 128, np.float32)
    for scanner in SCANNERS.values():
        assert scan(grey, scanner, noise)[..., 1].std() == pytest.approx(scanner.noise, rel=0.2)


def test_a_whole_field_lies_in_the_plane_of_its_scanners_published_stains() -> None:
    """Macenko's first step on finished pictures: the plane that holds most of the optical density."""
    angles = []
    for index in range(60):
        phantom = histology_phantom(11, index, index, 128)
        if phantom.attributes["artefact"] in ("pen", "bubble") or phantom.label in ("adipose tissue", "mucin"):
            continue  # ink is a third stain; too little stain to tell a plane
        scanner = SCANNERS[phantom.attributes["scanner"]]
        od = -np.log10(np.maximum(phantom.image, 1) / np.asarray(scanner.white)).reshape(-1, 3)
        od = od[(od > 0.1).any(1) & (phantom.image.reshape(-1, 3) > 12).all(1)]
        _, _, axes = np.linalg.svd(od, full_matrices=False)
        for published in scanner.vectors:
            off = unit(np.asarray(published)) @ axes[2]  # out of the plane
            angles.append(abs(np.rad2deg(np.arcsin(off))))
    assert len(angles) > 40 and np.median(angles) < 3 and np.quantile(angles, 0.9) < 8

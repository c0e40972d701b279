"""What tissue classes look like: one function per class lays out stain densities, nuclei and structures of a field.

A class function takes a `Plot` (random stream, field width, image size) and returns a `Tissue`. Lengths are in
micrometres, stain densities in optical density of that stain, distances positive inside. Cell sizes follow histology
textbooks roughly (a lymphocyte's nucleus is 6-7 um across, a carcinoma's 10-14); glands are drawn a little small so
that one is recognisable in a high-power field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np

from medclip.phantoms.glands import Glands, grow_glands
from medclip.phantoms.noise import (
    GRID,
    cell_borders,
    enlarge,
    grid_axes,
    lattice,
    lookup,
    ramp,
    smooth,
    streaks,
    texture,
)
from medclip.phantoms.nuclei import Nuclei, draw_nuclei, nucleoli, population


@dataclass
class Plot:
    """Where a tissue grows: its random stream, field width in micrometres, image size in pixels."""

    rng: np.random.Generator
    um: float
    size: int

    def scatter(self, spacing: float, jitter: float = 0.3) -> np.ndarray:
        """Evenly scattered points (n, 2)."""
        return lattice(self.rng, spacing, self.um, jitter).reshape(-1, 2)

    def full(self, coarse: np.ndarray) -> np.ndarray:
        return enlarge(coarse, self.size)

    def rough(self, um: float, sigma: float = 1.0) -> np.ndarray:
        """Pixel texture whose grains are about `um` micrometres wide."""
        return texture(self.rng, self.size, 2.5 * sigma * self.um / um, sigma)


@dataclass
class Tissue:
    """Stain densities without nuclei (size, size), the nuclei, named structures as coarse distances (n, g, g)."""

    hematoxylin: np.ndarray
    eosin: np.ndarray
    nuclei: Nuclei
    structures: list[tuple[str, np.ndarray]] = field(default_factory=list)


def _fibrous(
    plot: Plot, eosin: float, wave: float, gaps: float, contrast: float, length: float = 30.0, width: float = 1.2
) -> tuple[np.ndarray, np.ndarray]:
    """Eosin (size, size) of fibres with clear clefts where they part, and the fibre direction (GRID, GRID)."""
    fibre, direction = streaks(plot.rng, plot.um, plot.size, plot.rng.uniform(0, np.pi), wave, length, width)
    density = eosin * (1 + contrast * fibre)
    density *= ramp(fibre + np.float32(gaps), 0.8)
    density *= plot.full(1 + 0.15 * smooth(plot.rng, plot.um / 40))
    return np.maximum(density, 0.01), direction


def _spindle(plot: Plot, direction: np.ndarray, spacing: float, a: float, ratio: float) -> Nuclei:
    xy = plot.scatter(spacing, 0.45)
    return population(
        plot.rng, xy, a=a, ratio=ratio, spread=0.22, density=0.55, angle=lookup(direction, xy, plot.um), turn=0.12
    )


def _lymphocytes(
    plot: Plot,
    xy: np.ndarray,
    *,
    a: float = 3.2,
    ratio: float = 0.94,
    spread: float = 0.09,
    density: float = 0.85,
    ripple: float = 0.0,
) -> Nuclei:
    return population(plot.rng, xy, a=a, ratio=ratio, spread=spread, density=density, vesicle=0.05, ripple=ripple)


def _some(plot: Plot, xy: np.ndarray, share: float) -> np.ndarray:
    return xy[plot.rng.random(len(xy)) < share]


def _in_stroma(plot: Plot, glands: Glands, direction: np.ndarray, lymphocytes: float) -> Nuclei:
    """Fibroblasts and a share of lymphocytes between glands."""
    spindle = _spindle(plot, direction, 15.0, 5.0, 0.28)
    spindle = spindle.take(lookup(glands.wall, np.stack([spindle.x, spindle.y], 1), plot.um) < -4)
    free = _some(plot, plot.scatter(8.5), lymphocytes)
    return Nuclei.join(spindle, _lymphocytes(plot, free[lookup(glands.wall, free, plot.um) < -5]))


def benign_gland(plot: Plot) -> Tissue:
    """Round crypts, one row of basal nuclei, mucin vacuoles towards a small lumen, loose lamina propria."""
    rng = plot.rng
    glands = grow_glands(rng, plot.um, spacing=64, radius=27, lumen=0.26, uneven=0.05)
    matrix, direction = _fibrous(plot, 0.20, 5, 1.2, 0.25)
    inside, hollow = ramp(plot.full(glands.wall), 1.5), ramp(plot.full(glands.lumen), 1.5)
    xy, outward = glands.ring(rng, inset=4.5, spacing=4.6)
    basal = population(rng, xy, a=3.9, ratio=0.62, density=0.62, angle=outward, turn=0.12, vesicle=0.25)
    cups, axis = glands.ring(rng, inset=13.0, spacing=8.0)
    goblet = population(rng, cups, a=5.0, ratio=0.68, spread=0.15, density=1.0, angle=axis, turn=0.1, vesicle=0)
    mucin = _disc_cover(plot, goblet)
    eosin = matrix * (1 - inside) + inside * (0.26 + 0.03 * plot.rough(2.0)) * (1 - 0.85 * mucin)
    hematoxylin = 0.02 * (1 - inside) + inside * (0.07 + 0.06 * mucin)
    eosin, hematoxylin = eosin * (1 - 0.93 * hollow), hematoxylin * (1 - 0.9 * hollow)
    nuclei = Nuclei.join(basal, _in_stroma(plot, glands, direction, 0.35))
    return Tissue(hematoxylin, eosin, nuclei, glands.structures())


def adenocarcinoma(plot: Plot) -> Tissue:
    """Crowded, irregular, fused glands with ragged lumens; stratified large pleomorphic nuclei; dirty necrosis."""
    rng = plot.rng
    glands = grow_glands(rng, plot.um, spacing=66, radius=33, lumen=0.40, uneven=0.16)
    matrix, direction = _fibrous(plot, 0.30, 6, 0.9, 0.35)
    inside, hollow = ramp(plot.full(glands.wall), 1.5), ramp(plot.full(glands.lumen), 1.5)
    rows = [glands.ring(rng, inset, spacing, 2.2) for inset, spacing in ((6.0, 6.2), (13.0, 8.0))]
    xy, outward = np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])
    kept = lookup(glands.lumen, xy, plot.um) < -4
    cells = population(
        rng, xy[kept], a=5.6, ratio=0.62, spread=0.2, density=0.62, angle=outward[kept], turn=0.35,
        vesicle=0.4, ripple=0.13,
    )  # fmt: skip
    debris = _some(plot, plot.scatter(3.2, 0.5), 0.3)
    dirt = _lymphocytes(plot, debris[lookup(glands.lumen, debris, plot.um) > 4], a=1.0, spread=0.4, density=0.6)
    eosin = matrix * (1 - inside) + inside * (0.30 + 0.05 * plot.rough(2.5))
    hematoxylin = 0.03 + inside * (0.13 + 0.03 * plot.rough(3.0))
    soiled = plot.full(ramp(smooth(rng, plot.um / 14), 1.5)) * 0.18
    eosin = eosin * (1 - hollow) + hollow * soiled
    nuclei = Nuclei.join(cells, nucleoli(cells), dirt, _in_stroma(plot, glands, direction, 0.12))
    return Tissue(hematoxylin * (1 - 0.9 * hollow), eosin, nuclei, glands.structures())


def squamous_carcinoma(plot: Plot) -> Tissue:
    """Pavements of polygonal pink cells with visible borders, pleomorphic nuclei, and whorled keratin pearls."""
    rng, um = plot.rng, plot.um
    points = lattice(rng, 13.0, um, 0.25)
    border = cell_borders(points, 13.0, um)
    nest = smooth(rng, um / 50) + 1.1
    pearls = rng.uniform(0.15, 0.85, (1 + int(um > 200), 2)) * um
    each, whorl = _pearls(plot, pearls)
    pearl = each.max(0)
    nest = np.maximum(nest, pearl / 14 + 1)  # a pearl lies within its nest
    inside, keratin = ramp(plot.full(nest), 0.15), ramp(plot.full(pearl), 3)
    matrix, direction = _fibrous(plot, 0.25, 6, 0.8, 0.3)
    cell = 0.40 * (1 + 0.2 * plot.full(smooth(rng, um / 20))) * (0.45 + 0.55 * ramp(plot.full(border) - 0.7, 1.2))
    eosin = matrix * (1 - inside) + inside * cell
    eosin = eosin * (1 - keratin) + keratin * plot.full(0.62 + 0.13 * whorl)
    xy = points.reshape(-1, 2)
    kept = (lookup(nest, xy, um) > 0.1) & (lookup(pearl, xy, um) < -2)
    cells = population(rng, xy[kept], a=4.9, ratio=0.8, spread=0.24, density=0.66, vesicle=0.3, ripple=0.08)
    spindle = _spindle(plot, direction, 13.0, 5.5, 0.27)
    at = np.stack([spindle.x, spindle.y], 1)
    spindle = spindle.take((lookup(nest, at, um) < -0.1) & (lookup(pearl, at, um) < -5))
    hematoxylin = 0.02 + 0.08 * inside * (1 - keratin)
    return Tissue(hematoxylin, eosin, Nuclei.join(cells, nucleoli(cells, 1.35), spindle), [("keratin pearl", each)])


def _pearls(plot: Plot, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance fields (n, GRID, GRID) of keratin pearls, and their onion-skin pattern (GRID, GRID)."""
    x, y = grid_axes(plot.um)
    wobble = 1 + 0.12 * smooth(plot.rng, plot.um / 22)
    away = np.stack([np.hypot(x - cx, 1.25 * (y - cy)) for cx, cy in centres]) * wobble
    uneven = 1.1 * smooth(plot.rng, plot.um / 9)  # lamellae split and merge
    apart = max(3.8, 3.2 * plot.um / GRID)  # wide enough for the coarse grid
    lamellae = np.cos((away.min(0) + uneven) * (2 * np.pi / apart))
    return np.float32(plot.rng.uniform(15, 21)) - away, lamellae


def lymphoid(plot: Plot) -> Tissue:
    """Sheets of small, round, dark, monotonous nuclei with scant cytoplasm; paler germinal centres."""
    pale = smooth(plot.rng, plot.um / 80) - 0.7
    xy = plot.scatter(6.9, 0.27)
    centre = lookup(pale, xy, plot.um) > 0
    small = _lymphocytes(plot, xy[~centre])
    large = population(
        plot.rng, _some(plot, xy[centre], 0.8), a=3.9, ratio=0.88, spread=0.15, density=0.5, vesicle=0.45
    )
    eosin = 0.13 + 0.05 * plot.rough(3.0) + plot.full(0.05 * ramp(pale, 0.4))
    return Tissue(0.06 * np.ones_like(eosin), np.maximum(eosin, 0.02), Nuclei.join(small, large))


def stroma(plot: Plot) -> Tissue:
    """Wavy collagen with clefts, sparse thin spindle nuclei, a few lymphocytes."""
    eosin, direction = _fibrous(plot, 0.36, 7, 0.75, 0.38, length=34, width=1.9)
    lymphocytes = _lymphocytes(plot, _some(plot, plot.scatter(20, 0.5), 0.15))
    nuclei = Nuclei.join(_spindle(plot, direction, 19, 6.2, 0.2), lymphocytes)
    return Tissue(0.03 * np.ones_like(eosin), eosin, nuclei)


def smooth_muscle(plot: Plot) -> Tissue:
    """Dense parallel eosinophilic fascicles with cigar-shaped nuclei along them."""
    eosin, direction = _fibrous(plot, 0.52, 5, 2.3, 0.13, length=60, width=2.2)
    return Tissue(0.07 * np.ones_like(eosin), eosin, _spindle(plot, direction, 14.5, 7.8, 0.24))


def adipose(plot: Plot) -> Tissue:
    """Large empty fat cells behind thin membranes, a flat nucleus pressed against some of them."""
    rng, um = plot.rng, plot.um
    points = lattice(rng, 46.0, um, 0.3)
    border = cell_borders(points, 46.0, um)
    thickness = np.maximum(1.0 + 0.5 * smooth(rng, um / 40), 0.5)
    # at 1 um a pixel the membrane is thinner than a coarse cell: keep its total stain by widening and thinning it
    width = max(1.2, 0.8 * um / GRID)
    membrane = ramp(plot.full(thickness - border), width) * min(1.0, 1.8 / width)
    xy = rng.uniform(0, um, (2500, 2))
    xy = xy[lookup(border, xy, um) < 1.0][: round((um / 26) ** 2)]
    # a membrane is where distances meet, so slopes cancel there: average their squares (the structure tensor) instead
    slope_y, slope_x = np.gradient(border)
    squares = slope_x**2 - slope_y**2, 2 * slope_x * slope_y
    even, odd = (cv2.GaussianBlur(square, (0, 0), 3.0 * GRID / um + 0.8) for square in squares)
    along = lookup(0.5 * np.arctan2(odd, even) + np.pi / 2, xy, um)
    nuclei = population(rng, xy, a=4.6, ratio=0.3, spread=0.2, density=0.6, angle=along, turn=0.1)
    return Tissue(0.05 * membrane, 0.008 + 0.36 * membrane, nuclei)


def necrosis(plot: Plot) -> Tissue:
    """Smudged granular eosinophilic debris, ghosts of cells, nuclear dust and a few shrunken dark nuclei."""
    rng, um = plot.rng, plot.um
    clump = smooth(rng, um / 26)
    eosin = (
        0.40 + plot.full(0.09 * clump + 0.07 * smooth(rng, um / 9)) + 0.10 * plot.rough(1.6) + 0.05 * plot.rough(4.5)
    )
    ghosts = _disc_cover(plot, population(rng, plot.scatter(12, 0.4), a=4.4, spread=0.25, ripple=0.12))
    eosin *= 1 - 0.22 * ghosts
    dust = _some(plot, plot.scatter(4.6, 0.5), 0.42)
    dust = dust[lookup(clump, dust, um) > -0.6]
    fragments = _lymphocytes(plot, dust, a=1.0, ratio=0.8, spread=0.45, density=0.6)
    shrunken = _lymphocytes(plot, _some(plot, plot.scatter(19, 0.5), 0.4), a=2.4, spread=0.3, density=0.9, ripple=0.15)
    tint = plot.full(0.06 + 0.05 * ramp(clump, 1.5))
    return Tissue(tint, np.maximum(eosin, 0.05), Nuclei.join(fragments, shrunken))


def mucin(plot: Plot) -> Tissue:
    """Pale bluish pools with wispy strands and a few floating cells."""
    rng, um = plot.rng, plot.um
    strand, _ = streaks(rng, um, plot.size, rng.uniform(0, np.pi), 11, 38, 2.6)
    pool = plot.full(0.09 + 0.05 * smooth(rng, um / 45))
    hematoxylin = np.maximum(pool + 0.045 * strand, 0.015)
    eosin = np.maximum(0.05 + 0.04 * strand + plot.full(0.02 * smooth(rng, um / 30)), 0.01)
    clusters = smooth(rng, um / 40)
    xy = plot.scatter(8.0, 0.4)
    cluster = xy[lookup(clusters, xy, um) > 2.0]
    floating = population(rng, cluster, a=3.8, ratio=0.85, spread=0.2, density=0.6)
    single = _lymphocytes(plot, _some(plot, plot.scatter(24, 0.5), 0.25))
    return Tissue(hematoxylin, eosin + 0.22 * plot.full(ramp(clusters - 1.7, 0.5)), Nuclei.join(floating, single))


def _disc_cover(plot: Plot, discs: Nuclei) -> np.ndarray:
    """Soft coverage (size, size) of ellipses, drawn with the nuclei's own brush."""
    return np.minimum(draw_nuclei(discs, plot.um, plot.size), 1)


TISSUES: dict[str, Callable[[Plot], Tissue]] = {
    "benign glandular epithelium": benign_gland,
    "adenocarcinoma": adenocarcinoma,
    "squamous cell carcinoma": squamous_carcinoma,
    "lymphoid tissue": lymphoid,
    "stroma": stroma,
    "smooth muscle": smooth_muscle,
    "adipose tissue": adipose,
    "necrosis": necrosis,
    "mucin": mucin,
}

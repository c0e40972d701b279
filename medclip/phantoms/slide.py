"""Whole-slide phantoms with known truth: pieces of tissue on glass, divided into regions of the histology classes.

A slide belongs to a patient (stain, scanner) and has one diagnosis; its regions are polygons in level-0 pixels, laid
over each other like paper, so the class of any point is known. Pixels are made tile by tile, at any level, from a few
fields of each class that are laid side by side in random order and orientation, each blended into the next.

With `planted`, a tumour is one small region on a slide that is benign otherwise: what heads on bags of patches are to
find, and where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import shapely
import shapely.affinity
from shapely.geometry import LineString, Polygon
from shapely.geometry.base import BaseGeometry

from medclip.phantoms.captions import histology_captions
from medclip.phantoms.histology import STRENGTHS
from medclip.phantoms.noise import grain, texture
from medclip.phantoms.nuclei import draw_nuclei
from medclip.phantoms.phantom import patient_name
from medclip.phantoms.stain import SCANNERS, batch_vectors, scan, transmit
from medclip.phantoms.tissue import TISSUES, Plot
from medclip.types import UserError

GLASS = "glass"
_STREAM = 1001  # tells slides' random numbers from other phantoms'
_FIELDS = 4  # of each class; turned over in both directions they are 16
_BLEND = 32  # level-0 pixels over which a field passes into the next
_FIELD_UM = 224.0  # as wide as the histology phantoms' widest
_FINE = 4  # samples a pixel along each side where regions meet
_BITS = 4  # fraction bits of OpenCV's polygon corners
_INKS = MappingProxyType({"green": (0.13, 0.56, 0.28), "blue": (0.11, 0.28, 0.80), "black": (0.16, 0.17, 0.16)})

# What a slide of each diagnosis is made of, in the order in which it is laid down: the ground of every piece, what may
# lie about, the diagnosis itself, what lies on top of it.
_RECIPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        "benign glandular epithelium": (("stroma", "smooth muscle"), ("adipose tissue",), ("lymphoid tissue",)),
        "adenocarcinoma": (
            ("stroma", "smooth muscle"),
            ("adipose tissue", "benign glandular epithelium", "smooth muscle"),
            ("necrosis", "mucin", "lymphoid tissue"),
        ),
        "squamous cell carcinoma": (("stroma",), ("adipose tissue", "smooth muscle"), ("necrosis", "lymphoid tissue")),
    }
)
LABELS = tuple(_RECIPES)
_BENIGN = "benign glandular epithelium"


@dataclass(frozen=True)
class SlidePhantom:
    """A slide and everything that is known about it.

    Args:
        size: (width, height) of level 0.
        mpp: micrometres a level-0 pixel.
        label: the diagnosis, one of `LABELS`.
        attributes: facts as captions state them (stain) and the quantities behind them (scanner, pen, mpp).
        patient: whose slide it is.
        seed: of the set.
        index: of the slide in its set.
        layers: (class, polygon without holes) in level-0 pixels; a later one lies over the earlier ones.
        pen: area under ink, or None.
    """

    size: tuple[int, int]
    mpp: float
    label: str
    attributes: dict[str, Any]
    patient: str
    seed: int
    index: int
    layers: list[tuple[str, Polygon]]
    pen: BaseGeometry | None
    _stain: _Stain = field(repr=False)

    @property
    def name(self) -> str:
        """An identifier that differs between sets and slides."""
        return f"slide-{self.seed}-{self.index:05d}"

    def regions(self) -> list[tuple[str, BaseGeometry]]:
        """(class, area that shows) of every class, in level-0 pixels: disjoint, together all the tissue."""
        shown: dict[str, BaseGeometry] = {}
        above: BaseGeometry = Polygon()
        for label, polygon in reversed(self.layers):
            visible = polygon.difference(above)
            shown[label] = shown[label].union(visible) if label in shown else visible
            above = above.union(polygon)
        return [(label, area) for label, area in shown.items() if not area.is_empty]

    def tissue(self) -> BaseGeometry:
        """All that is not glass."""
        return shapely.union_all([polygon for _, polygon in self.layers])

    def classes_at(self, points: np.ndarray) -> list[str]:
        """The class at each of the level-0 points (n, 2), `GLASS` outside the tissue."""
        points = np.asarray(points, float)
        found = np.zeros(len(points), int)
        for place, (_, polygon) in enumerate(self.layers, 1):
            found[shapely.contains_xy(polygon, points[:, 0], points[:, 1])] = place
        names = [GLASS, *(label for label, _ in self.layers)]
        return [names[place] for place in found]

    def positions(self, count: int, side: int, share: float = 0.75) -> list[tuple[int, int, str]]:
        """(x, y, class) of up to `count` squares, `side` level-0 pixels wide, at least `share` of each of its class.

        x, y is the upper left corner. Classes take turns as far as their areas allow, so that small ones are there too.
        """
        rng = np.random.default_rng([self.seed, _STREAM, 2, self.index])
        groups = []
        for label, area in self.regions():
            shapely.prepare(area)
            squares = (
                shapely.box(x - side // 2, y - side // 2, x - side // 2 + side, y - side // 2 + side)
                for x, y in _points_in(area, rng, 40 * count)
            )
            fitting = (square for square in squares if area.intersection(square).area >= share * side**2)
            groups.append([(*square.bounds[:2], label) for square in islice(fitting, count)])
        turns = [group[at] for at in range(count) for group in groups if at < len(group)]
        return [(int(x), int(y), label) for x, y, label in turns[:count]]

    def captions(self, x: int, y: int, side: int, mpp: float | None = None) -> list[str]:
        """Sentences about the square at (x, y), by the class at its middle; none on glass.

        Args:
            x: level-0 pixels, of the upper left corner.
            y: likewise.
            side: level-0 pixels.
            mpp: at which the picture is shown, which decides the magnification that is named; the slide's own.
        """
        (label,) = self.classes_at(np.asarray([[x + side / 2, y + side / 2]]))
        if label == GLASS:
            return []
        power = min((10, 20, 40), key=lambda power: abs(np.log((mpp or self.mpp) * power / 10)))
        inked = self.pen is not None and self.pen.intersection(shapely.box(x, y, x + side, y + side)).area
        facts = {
            "magnification": f"{power}x",
            "stain": self.attributes["stain"],
            "artefact": "pen" if inked and inked > 0.02 * side**2 else "none",
        }
        rng = np.random.default_rng([self.seed, _STREAM, 3, self.index, max(x, 0), max(y, 0)])
        return histology_captions(rng, label, facts)

    def painter(
        self, downsamples: Sequence[int] = (1, 4, 16), tile_size: int = 256
    ) -> Callable[[int, int, int], np.ndarray]:
        """A function of (level, column, row) to a tile's pixels, uint8 (tile_size, tile_size, 3).

        Tiles may be asked for in any order; what lies beyond the slide's border goes on as the slide does.

        Raises:
            UserError: a downsample that the fields cannot be divided by.
        """
        if any(_BLEND % d for d in downsamples):
            raise UserError(f"levels {tuple(downsamples)} of a slide phantom: choose among 1, 2, 4, 8, 16 and 32")
        return _Painter(self, tuple(downsamples), tile_size).tile


def slide_phantom(
    seed: int,
    index: int,
    size: tuple[int, int] = (4000, 3000),
    mpp: float = 0.5,
    *,
    slides_per_patient: int = 1,
    label: str | None = None,
    pen: bool | None = None,
    planted: float | None = None,
) -> SlidePhantom:
    """The slide `index` of the endless set `seed`: the same arguments give the same pixels.

    Args:
        seed: of the set.
        index: of the slide.
        size: (width, height) of level 0.
        mpp: micrometres a level-0 pixel.
        slides_per_patient: neighbours in the set that share stain and scanner.
        label: the diagnosis; None: drawn.
        pen: with a pen mark; None: one slide in four.
        planted: a tumour's share of the tissue, 0.001 to 0.2, as one region on top of a slide that is laid out and
            painted as the benign one of this index; None: the diagnosis is all over every piece.

    Raises:
        UserError: a size, mpp, label or share that is not possible.
    """
    if min(size) < 256 or max(size) > 500_000:
        raise UserError(f"a slide phantom of {size[0]} x {size[1]} pixels is not possible: choose 256 to 500000")
    if not 0.1 <= mpp <= 2:
        raise UserError(f"a slide phantom at {mpp} micrometres a pixel is not possible: choose 0.1 to 2")
    if label is not None and label not in LABELS:
        raise UserError(f"unknown slide label {label!r}: choose one of {', '.join(LABELS)}")
    if planted is not None and not 0.001 <= planted <= 0.2:
        raise UserError(f"planted={planted}: a tumour takes 0.001 to 0.2 of a slide's tissue")
    rng = np.random.default_rng([seed, _STREAM, 0, index])
    patient = index // slides_per_patient
    stain = _Stain.draw(np.random.default_rng([seed, _STREAM, 1, patient]))
    drawn = str(rng.choice(LABELS))
    inked = bool(rng.random() < 0.25)
    label = drawn if label is None else label
    layers = _lay_out(rng, size, label if planted is None else _BENIGN)
    mark, ink = _pen_mark(rng, layers, size) if (inked if pen is None else pen) else (None, "none")
    if planted is not None and label != _BENIGN:
        # numbers of its own, so that all else, the ink too, is the benign slide's
        layers = _plant(np.random.default_rng([seed, _STREAM, 5, index]), layers, label, planted)
    attributes = {"stain": stain.strength, "scanner": stain.scanner, "pen": ink, "mpp": mpp}
    return SlidePhantom(
        size, mpp, label, attributes, patient_name("slide", seed, patient), seed, index, layers, mark, stain
    )


def blob(rng: np.random.Generator, centre: tuple[float, float], radius: tuple[float, float], rough: float) -> Polygon:
    """A smooth closed outline: an ellipse, turned, whose radius wavers by about `rough` of itself."""
    angle = np.linspace(0, 2 * np.pi, 181)[:-1]
    waves = np.arange(2, 9)
    swing, phase = rough * rng.normal(0, 1, 7) / waves, rng.uniform(0, 2 * np.pi, 7)
    r = np.maximum(1 + (swing[:, None] * np.cos(waves[:, None] * angle + phase[:, None])).sum(0), 0.3)
    turn = rng.uniform(-0.3, 0.3)
    x, y = radius[0] * r * np.cos(angle), radius[1] * r * np.sin(angle)
    along, across = np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y
    return Polygon(np.stack([centre[0] + along, centre[1] + across], 1))


def _lay_out(rng: np.random.Generator, size: tuple[int, int], label: str) -> list[tuple[str, Polygon]]:
    """Pieces of tissue and the regions on them. Every piece of a slide bears its diagnosis."""
    grounds, beside, above = _RECIPES[label]
    count = int(rng.integers(1, 4)) if max(size) > 1.2 * min(size) else 1
    step = np.asarray(size) / ((count, 1) if size[0] >= size[1] else (1, count))
    layers: list[tuple[str, Polygon]] = []
    ground = str(rng.choice(grounds))
    for number in range(count):
        middle = step * (0.5 + (np.asarray([number, 0]) if size[0] >= size[1] else np.asarray([0, number])))
        middle = middle + step * rng.uniform(-0.03, 0.03, 2)
        radius = step * rng.uniform(0.33, 0.39, 2)
        piece = blob(rng, (middle[0], middle[1]), (radius[0], radius[1]), 0.14)
        piece = max(shapely.get_parts(piece.intersection(shapely.box(0, 0, *size))), key=lambda part: part.area)
        layers.append((ground, piece))
        patches = [
            *((name, 0.30, 0.45) for name in beside if name != ground and rng.random() < 0.7),
            *((label, 0.42, 0.60) for _ in range(int(rng.integers(1, 3)))),
            *((name, 0.18, 0.30) for name in above if rng.random() < 0.6),
        ]
        for name, least, most in patches:
            away, towards = rng.uniform(0.0, 0.62), rng.uniform(0, 2 * np.pi)
            at = middle + away * radius * (np.cos(towards), np.sin(towards))
            reach = radius.mean() * rng.uniform(least, most) * rng.uniform(0.8, 1.25, 2)
            part = blob(rng, (at[0], at[1]), (reach[0], reach[1]), 0.22).intersection(piece)
            layers += [(name, p) for p in shapely.get_parts(part) if p.geom_type == "Polygon"]
    return layers


def _plant(
    rng: np.random.Generator, layers: list[tuple[str, Polygon]], label: str, share: float
) -> list[tuple[str, Polygon]]:
    """The layers with one region of `label` on top, of `share` of the tissue's area, whole inside one piece."""
    tissue = shapely.union_all([polygon for _, polygon in layers])
    pieces = sorted(
        (part for part in shapely.get_parts(tissue) if isinstance(part, Polygon)), key=lambda part: part.area
    )
    area = share * tissue.area
    reach = np.sqrt(area / np.pi) * rng.uniform(0.8, 1.25, 2)
    order = [pieces[int(k)] for k in rng.permutation(len(pieces))]
    for piece in [*order, pieces[-1]]:
        inner = piece.buffer(-1.3 * reach.max())
        places = [] if inner.is_empty else _points_in(inner, rng, 200)
        if places:
            break
    else:
        inner = pieces[-1].representative_point()
        places = [(int(inner.x), int(inner.y))]
    part = blob(rng, places[0], (reach[0], reach[1]), 0.22)
    scale = float(np.sqrt(area / part.area))
    part = shapely.affinity.scale(part, scale, scale, origin=places[0]).intersection(tissue)
    part = max((p for p in shapely.get_parts(part) if isinstance(p, Polygon)), key=lambda p: p.area)
    return [*layers, (label, Polygon(part.exterior))]


def _pen_mark(
    rng: np.random.Generator, layers: list[tuple[str, Polygon]], size: tuple[int, int]
) -> tuple[BaseGeometry, str]:
    """A pathologist's line along part of a region's outline, and the ink's name."""
    ring = np.asarray(layers[int(rng.integers(len(layers)))][1].buffer(0.02 * min(size)).exterior.coords)
    start, share = int(rng.integers(len(ring))), rng.uniform(0.4, 0.8)
    line = LineString(np.roll(ring[:-1], -start, 0)[: max(int(share * len(ring)), 8)])
    mark = line.buffer(min(size) * rng.uniform(0.010, 0.016))
    return mark.intersection(shapely.box(0, 0, *size)), str(rng.choice(list(_INKS)))


def _points_in(area: BaseGeometry, rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Whole-numbered points spread evenly over an area: those of `count` over the box around it that fall inside."""
    x0, y0, x1, y1 = area.bounds
    points = np.floor(rng.uniform((x0, y0), (x1, y1), (count, 2)))
    inside = shapely.contains_xy(area, points[:, 0], points[:, 1])
    return [(int(x), int(y)) for x, y in points[inside]]


@dataclass(frozen=True)
class _Stain:
    """How a patient's slides are stained and scanned."""

    scanner: str
    strength: str
    vectors: np.ndarray  # (2, 3)
    balance: np.ndarray  # (2,)

    @staticmethod
    def draw(rng: np.random.Generator) -> _Stain:
        scanner, strength = str(rng.choice(list(SCANNERS))), str(rng.choice(list(STRENGTHS), p=[0.25, 0.5, 0.25]))
        vectors = batch_vectors(SCANNERS[scanner], rng)
        return _Stain(scanner, strength, vectors, rng.normal(1, 0.07, 2) * STRENGTHS[strength])

    def render(self, label: str, rng: np.random.Generator, um: float, size: int) -> np.ndarray:
        """A field of a class, or of glass, uint8 (size, size, 3)."""
        hematoxylin = eosin = np.zeros((size, size), np.float32)
        if label != GLASS:
            tissue = TISSUES[label](Plot(rng, um, size))
            nuclear = draw_nuclei(tissue.nuclei, um, size)
            hematoxylin = np.maximum(tissue.hematoxylin, 0) + nuclear * (1 + 0.17 * texture(rng, size, um / 0.45))
            eosin = tissue.eosin * (1 - 0.35 * np.minimum(nuclear, 1))
        hematoxylin = np.asarray(self.balance[0] * hematoxylin, np.float32)
        eosin = np.asarray(self.balance[1] * eosin, np.float32)
        scanner = SCANNERS[self.scanner]
        return scan(transmit(hematoxylin, eosin, self.vectors, scanner), scanner, grain(rng, size, 0.7))


class _Painter:
    """Tiles of one slide. Fields are rendered when first needed."""

    def __init__(self, slide: SlidePhantom, downsamples: tuple[int, ...], side: int) -> None:
        self.slide, self.downsamples, self.side = slide, downsamples, side
        blocks = int(np.clip(round(_FIELD_UM / slide.mpp / _BLEND), 4, 31))
        self.field = blocks * _BLEND  # level-0 pixels; 1024 is the noise bank's limit
        self._fields: dict[tuple[str, int], list[np.ndarray]] = {}
        for _, polygon in slide.layers:
            shapely.prepare(polygon)
        if slide.pen is not None:
            shapely.prepare(slide.pen)

    def tile(self, level: int, column: int, row: int) -> np.ndarray:
        d, side = self.downsamples[level], self.side
        x, y = column * side, row * side
        shown = [(GLASS, np.ones((side, side), np.float32))]
        for label, polygon in self.slide.layers:
            cover = _cover(polygon, d, x, y, side)
            if cover is not None and cover.min() == 1:
                shown = []  # hides what is below
            if cover is not None:
                shown.append((label, cover))
        out = self._plane(shown[0][0], level, x, y)
        for label, cover in shown[1:]:
            out = cv2.blendLinear(self._plane(label, level, x, y), out, cover, 1 - cover)
        ink = _cover(self.slide.pen, d, x, y, side) if self.slide.pen is not None else None
        if ink is not None:
            light = np.asarray(_INKS[self.slide.attributes["pen"]], np.float32)
            out = cv2.blendLinear((out * light).astype(np.uint8), out, ink, 1 - ink)
        return out

    def _plane(self, label: str, level: int, x: int, y: int) -> np.ndarray:
        """The tile at (x, y) if all were of one class: fields overlap by `_BLEND`, and their weights add up to one."""
        d, side = self.downsamples[level], self.side
        fields = self._weighted(label, level)
        step, reach = (self.field - _BLEND) // d, self.field // d
        total = np.zeros((side, side, 3), np.uint16)
        for j in range(y // step - 1, (y + side - 1) // step + 1):
            for i in range(x // step - 1, (x + side - 1) // step + 1):
                left, top = i * step - x, j * step - y
                x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + reach, side), min(top + reach, side)
                if x1 > x0 and y1 > y0:
                    pick = _hash(i, j, self.slide.index)
                    source = fields[pick % _FIELDS][:: 1 - 2 * (pick >> 8 & 1), :: 1 - 2 * (pick >> 9 & 1)]
                    total[y0:y1, x0:x1] += source[y0 - top : y1 - top, x0 - left : x1 - left]
        return cv2.convertScaleAbs(total, alpha=1 / 256)

    def _weighted(self, label: str, level: int) -> list[np.ndarray]:
        """The class's fields at a level, uint16 (reach, reach, 3), times 256 and a weight that falls off to the rim."""
        key = (label, self.downsamples[level])
        if key not in self._fields:
            if (label, 1) not in self._fields:
                self._fields[label, 1] = [self._field(label, number) for number in range(_FIELDS)]
            reach = self.field // key[1]
            self._fields[key] = [
                cv2.resize(full, (reach, reach), interpolation=cv2.INTER_AREA) for full in self._fields[label, 1]
            ]
        return self._fields[key]

    def _field(self, label: str, number: int) -> np.ndarray:
        slide = self.slide
        place = [GLASS, *TISSUES].index(label)
        rng = np.random.default_rng([slide.seed, _STREAM, 4, slide.index, place, number])
        pixels = slide._stain.render(label, rng, self.field * slide.mpp, self.field)
        # 1, 3 .. 15 of 16: a weight and its mirror image, the neighbour's, add up to 16, all four in a corner to 256
        weight = np.full(self.field, 16, np.uint16)
        weight[:_BLEND] = 2 * (np.arange(_BLEND) * 8 // _BLEND) + 1
        weight[-_BLEND:] = weight[:_BLEND][::-1]
        return pixels * (weight[:, None] * weight[None, :])[..., None]


def _cover(area: BaseGeometry, d: int, x: int, y: int, side: int) -> np.ndarray | None:
    """How much of each pixel of the tile at (x, y) an area covers, float32 (side, side); None where it covers none.

    Counted on a raster `_FINE` times as fine, with OpenCV's rule that a pixel on the outline belongs to the polygon.
    """
    tile = shapely.box(x * d, y * d, (x + side) * d, (y + side) * d)
    if not area.intersects(tile):
        return None
    if area.contains_properly(tile):
        return np.ones((side, side), np.float32)
    # cut to the tile first: OpenCV's coordinates have few bits; the margin keeps the cut's own edge out of sight
    part = shapely.clip_by_rect(area, (x - 4) * d, (y - 4) * d, (x + side + 4) * d, (y + side + 4) * d)
    rings = [
        np.rint(((np.asarray(ring.coords) / d - (x, y)) * _FINE - 0.5) * 2**_BITS).astype(np.int32)
        for polygon in shapely.get_parts(part)
        if isinstance(polygon, Polygon)
        for ring in (polygon.exterior, *polygon.interiors)
    ]
    if not rings:
        return None
    raster = np.zeros((side * _FINE, side * _FINE), np.uint8)
    cv2.fillPoly(raster, rings, 255, cv2.LINE_8, _BITS)
    cover = cv2.resize(raster, (side, side), interpolation=cv2.INTER_AREA)
    return cover * np.float32(1 / 255) if cover.any() else None


def _hash(i: int, j: int, seed: int) -> int:
    """A number that looks random for each place of a grid."""
    mixed = (i * 0x9E3779B1 ^ j * 0x85EBCA77 ^ seed * 0xC2B2AE3D) & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 0x2C1B3C6D & 0xFFFFFFFF
    return mixed ^ mixed >> 13

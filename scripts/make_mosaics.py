"""Whole slides put together from real tiles, a rare class planted among the background, with the truth.

    python scripts/make_mosaics.py --table labels.jsonl --label label --group tissue_cluster \\
        --background lung_n --plant lung_aca lung_scc --out folder --slides 150 --share 0.02 0.06

Every slide is a grid of tiles of the background, turned and mirrored at random; on those that are labelled with a
planted class some of the tiles are of that class, next to each other or scattered. Gives `slides/ID.svs` (pyramidal
TIFF), `truth/ID.geojson` (the planted tiles as annotations, in level-0 pixels, as QuPath opens them), `slides.csv`
(slide, path, mpp, label, patient, split, planted) and `tiles.csv` (which tile lies where). The groups of tiles, such as
the tissue or the patient that they are of, are divided into train, val and test first, and a slide has tiles of its own
part alone. A tile appears on many slides, also of different patients: intervals do not know that.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
from shapely.geometry import mapping

from medclip.data.evalset import EvalSet
from medclip.types import Preprocess, UserError
from slides.errors import SlideError
from slides.files import write_whole
from slides.geojson import write_geojson
from slides.pyramid import APERIO, Mosaic

SPLITS = ("train", "val", "test")
_COLOURS = ((200, 30, 30), (220, 90, 20), (90, 60, 180), (110, 190, 230))
_GLASS = 243


@dataclass(frozen=True)
class Tiles:
    """Pictures uint8 (side, side, 3), each with a key, a label and a group."""

    images: list[np.ndarray]
    keys: list[str]
    labels: list[str]
    groups: list[str]

    def of(self, label: str, groups: set[str]) -> np.ndarray:
        """int64 numbers of the tiles of a label in some groups."""
        pairs = zip(self.labels, self.groups, strict=True)
        return np.asarray([i for i, (one, group) in enumerate(pairs) if one == label and group in groups], np.int64)


@dataclass(frozen=True)
class Plan:
    """One slide: what lies in each cell of its grid."""

    name: str
    label: str
    patient: str
    split: str
    tile: np.ndarray  # int64 (rows, columns) numbers of tiles
    turn: np.ndarray  # int64 (rows, columns): quarter turns, plus 4 where it is mirrored
    planted: np.ndarray  # bool (rows, columns)


def read_tiles(chosen: argparse.Namespace) -> Tiles:
    """The tiles of a table or of a folder of class folders, cut to squares of `--side`."""
    source: dict[str, Any] = {"folder": str(chosen.folder)} if chosen.folder else {"table": str(chosen.table)}
    if chosen.table and chosen.image:
        source["columns"] = {"image": chosen.image}
    tiles = EvalSet([source], label=chosen.label, group=chosen.group)
    found = Tiles([], [], [], [])
    wanted = {chosen.background, *chosen.plant}
    batch: Any
    for batch in tiles.batches(Preprocess(size=(chosen.side, chosen.side))):
        for image, key, meta in zip(batch["image"], batch["key"], batch["meta"], strict=False):
            if meta["label"] in wanted:
                found.images.append(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
                found.keys.append(key)
                found.labels.append(str(meta["label"]))
                found.groups.append(str(meta["group"] if chosen.group else key))
    if missing := wanted - set(found.labels):
        raise UserError(f"no tile has the label {', '.join(sorted(missing))}: see --background, --plant and --label")
    return found


def divide(tiles: Tiles, shares: Sequence[float], rng: np.random.Generator) -> list[set[str]]:
    """Groups of each of `SPLITS`, disjoint, by about these shares of every label's groups.

    Raises:
        UserError: a label has too few groups to be in every part.
    """
    parts: list[set[str]] = [set() for _ in SPLITS]
    seen: set[str] = set()
    for label in sorted(set(tiles.labels)):
        groups = sorted({group for one, group in zip(tiles.labels, tiles.groups, strict=True) if one == label} - seen)
        seen |= set(groups)
        order = [groups[i] for i in rng.permutation(len(groups))]
        ends = np.rint(np.cumsum(shares) * len(order)).astype(int)
        for part, first, last, share in zip(parts, [0, *ends[:-1]], ends, shares, strict=True):
            if share > 0 and not len(tiles.of(label, set(order[first:last]))):
                raise UserError(f"{label}: {len(order)} groups do not reach for --split {' '.join(map(str, shares))}")
            part |= set(order[first:last])
    return parts


def plans(tiles: Tiles, chosen: argparse.Namespace) -> list[Plan]:
    """All slides of the set; each split has every label as often, to within one."""
    rng = np.random.default_rng([chosen.seed, 0])
    groups = divide(tiles, chosen.split, rng)
    ends = np.rint(np.cumsum(chosen.split) * math.ceil(chosen.slides / chosen.per_patient)).astype(int)
    # whole patients, so that none is in two parts
    counts = np.diff([0, *(min(end * chosen.per_patient, chosen.slides) for end in ends)])
    found: list[Plan] = []
    for split, count, own in zip(SPLITS, counts, groups, strict=True):
        labels = list(islice(cycle((chosen.background, *chosen.plant)), int(count)))
        for label in (labels[i] for i in rng.permutation(len(labels))):
            number = len(found)
            name, patient = f"mosaic-{chosen.seed}-{number:05d}", f"patient-{number // chosen.per_patient:05d}"
            found.append(lay(tiles, own, chosen, (name, label, patient, split), number))
    return found


def lay(
    tiles: Tiles, groups: set[str], chosen: argparse.Namespace, about: tuple[str, str, str, str], number: int
) -> Plan:
    """One slide's grid."""
    rng = np.random.default_rng([chosen.seed, 1, number])
    rows, columns = (int(n) for n in rng.integers(chosen.cells[0], chosen.cells[1] + 1, 2))
    tile = drawn(tiles.of(chosen.background, groups), rows * columns, rng).reshape(rows, columns)
    planted = np.zeros((rows, columns), bool)
    if about[1] != chosen.background:
        count = max(1, round(rng.uniform(*chosen.share) * rows * columns))
        together = rng.random() < 0.5 if chosen.spread == "both" else chosen.spread == "together"
        planted = place((rows, columns), count, together, rng)
        tile[planted] = drawn(tiles.of(about[1], groups), count, rng)
    return Plan(*about, tile, rng.integers(0, 8, (rows, columns)), planted)


def drawn(deck: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the deck in random order; none twice before all were there."""
    times = math.ceil(count / len(deck))
    return np.concatenate([rng.permutation(deck) for _ in range(times)])[:count]


def place(shape: tuple[int, int], count: int, together: bool, rng: np.random.Generator) -> np.ndarray:
    """bool of `shape` with `count` cells set: scattered, or grown from one cell, each next to one before."""
    found = np.zeros(shape, bool)
    if not together:
        found.flat[rng.choice(found.size, count, replace=False)] = True
        return found
    found[tuple(rng.integers(0, shape))] = True
    while found.sum() < count:
        near = cv2.dilate(found.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))).astype(bool)
        found.flat[rng.choice(np.flatnonzero(near & ~found))] = True
    return found


def turned(image: np.ndarray, turn: int) -> np.ndarray:
    """One of a square's eight positions."""
    return np.ascontiguousarray(np.rot90(image[:, ::-1] if turn >= 4 else image, turn % 4))


def write(path: Path, plan: Plan, tiles: Tiles, side: int, margin: int, mpp: float) -> None:
    """The slide, with `margin` cells of glass around the tissue; each cell is one tile of the file."""
    order = list(zip(plan.tile.ravel().tolist(), plan.turn.ravel().tolist(), strict=True))
    number = {pair: i for i, pair in enumerate(dict.fromkeys(order))}
    textures = [turned(tiles.images[tile], turn) for tile, turn in number]
    textures.append(np.full((side, side, 3), _GLASS, np.uint8))
    regions = np.asarray([number[pair] for pair in order]).reshape(plan.tile.shape)
    regions = np.pad(regions, margin, constant_values=len(number))
    rows, columns = regions.shape
    small = [cv2.resize(texture, (16, 16), interpolation=cv2.INTER_AREA) for texture in textures]
    thumbnail = np.vstack([np.hstack([small[i] for i in row]) for row in regions])
    size = (columns * side, rows * side)
    mosaic = Mosaic(regions, side, textures, size, tile_size=side, encoding=APERIO)
    power = min((10, 20, 40), key=lambda power: abs(mpp - 10 / power))
    mosaic.write(path, mpp=mpp, power=power, associated={"thumbnail": thumbnail})


def truth(plan: Plan, side: int, margin: int, classes: Sequence[str]) -> dict[str, Any]:
    """The planted tiles as GeoJSON in level-0 pixels, neighbours as one annotation."""
    corners = [((x + margin) * side, (y + margin) * side) for y, x in np.argwhere(plan.planted).tolist()]
    boxes = [shapely.box(x, y, x + side, y + side) for x, y in corners]
    colour = _COLOURS[classes.index(plan.label) % len(_COLOURS)] if boxes else None
    return {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "geometry": mapping(part),
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": plan.label, "color": list(colour or ())},
                },
            }
            for part in shapely.get_parts(shapely.union_all(boxes))
        ],
    }


def rows_of(plan: Plan, tiles: Tiles, side: int, margin: int) -> Iterator[Mapping[str, Any]]:
    """A row of tiles.csv for each cell."""
    for row, column in np.ndindex(plan.tile.shape):
        tile = int(plan.tile[row, column])
        yield {
            "slide": plan.name,
            "x": (column + margin) * side,
            "y": (row + margin) * side,
            "tile": tiles.keys[tile],
            "label": tiles.labels[tile],
            "group": tiles.groups[tile],
            "turn": int(plan.turn[row, column]),
        }


def make_mosaics(chosen: argparse.Namespace) -> int:
    """Complete the folder; returns how many slides were not there yet."""
    _check(chosen)
    tiles = read_tiles(chosen)
    found = plans(tiles, chosen)
    _claim(chosen)
    made = 0
    for plan in found:
        path = chosen.out / "slides" / f"{plan.name}.svs"
        if not path.exists():  # bears its name only when complete, and its truth is there before it
            write_geojson(
                chosen.out / "truth" / f"{plan.name}.geojson", truth(plan, chosen.side, chosen.margin, chosen.plant)
            )
            write(path, plan, tiles, chosen.side, chosen.margin, chosen.mpp)
            made += 1
    slides = [
        {
            "slide": plan.name,
            "path": f"slides/{plan.name}.svs",
            "mpp": chosen.mpp,
            "label": plan.label,
            "patient": plan.patient,
            "split": plan.split,
            "planted": round(float(plan.planted.mean()), 4),
        }
        for plan in found
    ]
    _table(chosen.out / "tiles.csv", [row for p in found for row in rows_of(p, tiles, chosen.side, chosen.margin)])
    _table(chosen.out / "slides.csv", slides)
    return made


def _check(chosen: argparse.Namespace) -> None:
    if (chosen.table is None) == (chosen.folder is None):
        raise UserError("give either --table or --folder")
    if min(chosen.slides, chosen.per_patient, *chosen.cells) < 1 or chosen.cells[0] > chosen.cells[1]:
        raise UserError("--slides, --per-patient and --cells must be at least 1, and --cells the least first")
    if not 0 < chosen.share[0] <= chosen.share[1] < 1:
        raise UserError(
            f"--share {chosen.share[0]} {chosen.share[1]}: give two shares between 0 and 1, the least first"
        )
    if chosen.side < 32 or chosen.side % 16 or chosen.margin < 0:
        raise UserError(f"--side {chosen.side} --margin {chosen.margin}: a side is a multiple of 16, 32 at least")
    if min(chosen.split) < 0 or not math.isclose(sum(chosen.split), 1, abs_tol=1e-6):
        raise UserError(f"--split {' '.join(map(str, chosen.split))}: three shares that add up to 1")
    if chosen.background in chosen.plant or len(set(chosen.plant)) < len(chosen.plant):
        raise UserError("--plant names the background, or a class twice")


def _claim(chosen: argparse.Namespace) -> None:
    """Make the folder, or see that it holds slides of the same recipe."""
    recipe = {key: str(value) if isinstance(value, Path) else value for key, value in vars(chosen).items()}
    del recipe["out"]
    mark = chosen.out / "recipe.json"
    try:
        for name in ("slides", "truth"):
            (chosen.out / name).mkdir(parents=True, exist_ok=True)
        if mark.exists() and json.loads(mark.read_text()) != recipe:
            raise UserError(f"{chosen.out} holds slides of another recipe ({mark}): choose another folder")
    except OSError as error:
        raise UserError(f"cannot write to {chosen.out}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{mark} is no JSON: remove it, or choose another folder") from None
    write_whole(mark, json.dumps(recipe).encode())


def _table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(path, text.getvalue().encode())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="of tiles: CSV, JSONL, parquet; images relative to its folder")
    parser.add_argument("--folder", type=Path, help="of class folders, instead of a table")
    parser.add_argument("--image", help="column of the image's path, where its name is not a usual one")
    parser.add_argument("--label", default="label", help="column of the class (%(default)s)")
    parser.add_argument(
        "--group", help="column of what must not be in two parts: tissue, patient (each tile by itself)"
    )
    parser.add_argument("--background", required=True, help="class that slides are made of")
    parser.add_argument("--plant", required=True, nargs="+", help="classes that are planted, one on a slide")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--slides", type=int, default=150, help="how many (%(default)s)")
    parser.add_argument("--per-patient", type=int, default=1, help="slides of a patient (%(default)s)")
    parser.add_argument("--cells", type=int, nargs=2, default=(16, 16), metavar=("LEAST", "MOST"), help="tiles a side")
    parser.add_argument("--share", type=float, nargs=2, default=(0.02, 0.06), metavar=("LEAST", "MOST"), help="planted")
    parser.add_argument(
        "--spread", choices=("together", "scattered", "both"), default="both", help="of what is planted"
    )
    parser.add_argument("--split", type=float, nargs=3, default=(0.5, 0.2, 0.3), help="train, val, test (0.5 0.2 0.3)")
    parser.add_argument("--side", type=int, default=224, help="pixels of a tile (%(default)s)")
    parser.add_argument("--margin", type=int, default=1, help="tiles of glass around (%(default)s)")
    parser.add_argument("--mpp", type=float, default=0.5, help="that is written into the slides (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the set (%(default)s)")
    chosen = parser.parse_args(arguments)
    for key in ("cells", "share", "split", "plant"):
        setattr(chosen, key, list(getattr(chosen, key)))
    try:
        made = make_mosaics(chosen)
    except (UserError, SlideError) as error:
        print(f"make_mosaics: {error}", file=sys.stderr)
        return 2
    print(f"{chosen.out}: {chosen.slides} slides, {made} of them written now")
    return 0


if __name__ == "__main__":
    sys.exit(main())

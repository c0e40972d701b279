"""A labelled contact sheet of phantoms: a row for each class, a column for each of its first images.

    python scripts/contact_sheet.py --columns 5 --show 104 --colours 192 --seed 11 --out docs/phantoms.png
    python scripts/contact_sheet.py --kind xray --seed 3 --size 320 --columns 4 --boxes --out runs/xray.png

A few images of each class are worth more than many numbers: look at them after every change of the drawing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medclip.phantoms.generate import CLASSES, generate
from medclip.phantoms.phantom import KINDS, Phantom
from medclip.types import UserError

_INK, _PAPER = (30, 30, 30), (255, 255, 255)
_BOX = {"gland": (0, 90, 0), "lumen": (0, 60, 200)}  # others in orange
_GAP, _LINE, _MARGIN = 4, 16, 128


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=[*KINDS, "both"], default="both")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="of the set (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image as it is drawn (%(default)s)")
    parser.add_argument("--show", type=int, help="pixels of an image on the sheet (--size)")
    parser.add_argument(
        "--columns", type=int, default=6, help="images of a class; with both, of the first kind (%(default)s)"
    )
    parser.add_argument("--colours", type=int, help="quantise to so many colours, for a smaller file")
    parser.add_argument("--boxes", action="store_true", help="draw the boxes of what is known")
    chosen = parser.parse_args(arguments)
    kinds = KINDS if chosen.kind == "both" else (chosen.kind,)
    show = chosen.show or chosen.size
    try:
        sheets = [sheet(kinds[0], chosen.seed, chosen.size, chosen.columns, show, boxes=chosen.boxes)]
        for kind in kinds[1:]:  # beside the first and as high: fewer rows of larger images
            larger = (sheets[0].height - _GAP) // len(CLASSES[kind]) - _LINE - _GAP
            columns = max(round(chosen.columns * show / larger), 1)
            sheets.append(sheet(kind, chosen.seed, chosen.size, columns, larger, boxes=chosen.boxes))
    except UserError as error:
        print(f"contact_sheet: {error}", file=sys.stderr)
        return 2
    page = Image.new("RGB", (sum(part.width for part in sheets), max(part.height for part in sheets)), _PAPER)
    left = 0
    for part in sheets:
        page.paste(part, (left, 0))
        left += part.width
    if chosen.colours:
        page = page.quantize(chosen.colours, kmeans=2, dither=Image.Dither.FLOYDSTEINBERG)
    try:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        page.save(chosen.out, "PNG", optimize=True)
    except OSError as error:
        print(f"contact_sheet: cannot write {chosen.out} ({error.strerror}): choose another --out", file=sys.stderr)
        return 2
    print(f"{chosen.out}: {page.width} x {page.height}, {chosen.out.stat().st_size / 1e3:.0f} kB")
    return 0


def sheet(kind: str, seed: int, size: int, columns: int, show: int, *, boxes: bool) -> Image.Image:
    """The sheet of one kind: class names at the left, the facts that differ under each image."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    rows = list(first_of_each_class(kind, seed, size, columns))
    page = Image.new("RGB", (_MARGIN + columns * (show + _GAP), len(rows) * (show + _LINE + _GAP) + _GAP), _PAPER)
    pen = ImageDraw.Draw(page)
    for row, phantoms in enumerate(rows):
        top = _GAP + row * (show + _LINE + _GAP)
        pen.multiline_text((6, top + show // 2 - 20), phantoms[0].label.replace(" ", "\n"), _INK, font, spacing=3)
        for column, phantom in enumerate(phantoms):
            left = _MARGIN + column * (show + _GAP)
            picture = _with_boxes(phantom) if boxes else phantom.image
            if show != size:
                picture = cv2.resize(picture, (show, show), interpolation=cv2.INTER_AREA)
            page.paste(Image.fromarray(picture), (left, top))
            pen.text((left + 2, top + show + 1), _facts(phantom), _INK, small)
    return page


def first_of_each_class(kind: str, seed: int, size: int, columns: int) -> Iterator[list[Phantom]]:
    """The first `columns` phantoms of every class, each of another patient."""
    found: dict[str, list[Phantom]] = {label: [] for label in CLASSES[kind]}
    for patient in count():
        phantom = generate(kind, seed, [patient], size, per_patient=1)[0]
        if len(found[phantom.label]) < columns:
            found[phantom.label].append(phantom)
        if all(len(phantoms) == columns for phantoms in found.values()):
            break
    yield from found.values()


def _facts(phantom: Phantom) -> str:
    names = (
        ("magnification", "stain", "artefact") if phantom.kind == "histology" else ("view", "severity", "side", "zone")
    )
    return " ".join(str(phantom.attributes[n]) for n in names if phantom.attributes[n] not in ("none", "regular"))


def _with_boxes(phantom: Phantom) -> np.ndarray:
    picture = phantom.image.copy()
    for name, x0, y0, x1, y1 in phantom.boxes:
        cv2.rectangle(picture, (x0, y0), (x1 - 1, y1 - 1), _BOX.get(name, (230, 120, 0)), 1)
    return picture


if __name__ == "__main__":
    sys.exit(main())

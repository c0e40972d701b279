"""Write whole-slide phantoms with their truth; a killed run goes on where it was.

    python scripts/make_slides.py --out folder --slides 50 --size 4000 3000 --mpp 0.5 --seed 1 --captions 40

gives `slides/ID.svs`, `truth/ID.geojson` (an annotation per class, as QuPath opens them, and the ink), `slides.csv`
(slide, path, mpp, label, patient) and, where asked for, `captions.jsonl` in the layout of PathGen-1.6M: one object per
patch with `wsi_id`, `position` (level-0 x and y of the upper left corner, as text), `caption` and `file_id`, and
beside them `label` (the class of its tissue) and `patient`.

    python scripts/make_slides.py --out folder --slides 200 --size 2688 2016 --seed 1 --planted 0.02 0.06

leaves every slide benign but for one tumour of 2 to 6 % of the tissue on those that are labelled so: bags for MIL. The
column `planted` of slides.csv has each slide's share, 0 where there is none; `truth` has the region.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from shapely.geometry import mapping

from medclip.phantoms.slide import LABELS, SlidePhantom, slide_phantom
from medclip.types import UserError
from slides.errors import SlideError
from slides.geojson import write_geojson
from slides.pyramid import APERIO, write_pyramid

_COLOURS = {
    "benign glandular epithelium": (70, 160, 70), "adenocarcinoma": (200, 30, 30),
    "squamous cell carcinoma": (220, 90, 20), "lymphoid tissue": (90, 60, 180), "stroma": (230, 150, 190),
    "smooth muscle": (180, 90, 120), "adipose tissue": (240, 220, 90), "necrosis": (90, 90, 90),
    "mucin": (110, 190, 230), "pen": (0, 0, 0),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--slides", type=int, default=10, help="how many (%(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(4000, 3000), help="width and height of level 0 (4000 3000)"
    )
    parser.add_argument("--mpp", type=float, default=0.5, help="micrometres a level-0 pixel (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the set (%(default)s)")
    parser.add_argument("--per-patient", type=int, default=1, help="slides of a patient (%(default)s)")
    parser.add_argument(
        "--planted", type=float, nargs=2, metavar=("LEAST", "MOST"), help="a tumour's share of the tissue (no limit)"
    )
    parser.add_argument("--captions", type=int, default=0, help="captioned patches of a slide (none)")
    parser.add_argument("--patch", type=int, default=672, help="their side, level-0 pixels (%(default)s, PathGen's)")
    chosen = parser.parse_args(arguments)
    try:
        made = make_slides(chosen)
    except (UserError, SlideError) as error:
        print(f"make_slides: {error}", file=sys.stderr)
        return 2
    print(f"{chosen.out}: {chosen.slides} slides, {made} of them written now")
    return 0


def make_slides(chosen: argparse.Namespace) -> int:
    """Complete the folder; returns how many slides were not there yet."""
    if min(chosen.slides, chosen.per_patient, chosen.patch) < 1:
        raise UserError("--slides, --per-patient and --patch must be at least 1")
    size = (chosen.size[0], chosen.size[1])
    bounds: list[float] | None = chosen.planted
    shares: list[float | None] = [None] * chosen.slides
    if bounds is not None:
        if bounds[0] > bounds[1]:
            raise UserError(f"--planted {bounds[0]} {bounds[1]}: give the least share first")
        seeds = ([chosen.seed, 1002, index] for index in range(chosen.slides))
        shares = [float(np.random.default_rng(seed).uniform(bounds[0], bounds[1])) for seed in seeds]
    phantoms = [
        slide_phantom(chosen.seed, index, size, chosen.mpp, slides_per_patient=chosen.per_patient, planted=share)
        for index, share in enumerate(shares)
    ]
    recipe = {"size": list(size), "mpp": chosen.mpp, "seed": chosen.seed, "per_patient": chosen.per_patient}
    _claim(chosen.out, recipe | ({} if bounds is None else {"planted": bounds}))
    made = 0
    for slide in phantoms:
        path = chosen.out / "slides" / f"{slide.name}.svs"
        if not path.exists():  # bears its name only when complete, and its truth is there before it
            write_geojson(chosen.out / "truth" / f"{slide.name}.geojson", truth(slide))
            power = min((10, 20, 40), key=lambda power, mpp=slide.mpp: abs(mpp - 10 / power))
            write_pyramid(path, size, slide.painter(), mpp=slide.mpp, power=power, encoding=APERIO)
            made += 1
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("slide", "path", "mpp", "label", "patient", *([] if bounds is None else ["planted"])))
    for s, share in zip(phantoms, shares, strict=True):
        bears = s.label != LABELS[0]
        extra = [] if share is None else [f"{share if bears else 0:.4f}"]
        rows.writerow((s.name, f"slides/{s.name}.svs", s.mpp, s.label, s.patient, *extra))
    _replace(chosen.out / "slides.csv", table.getvalue())
    if chosen.captions:
        lines = [json.dumps(line) for slide in phantoms for line in captions(slide, chosen.captions, chosen.patch)]
        _replace(chosen.out / "captions.jsonl", "".join(f"{line}\n" for line in lines))
    return made


def truth(slide: SlidePhantom) -> dict[str, Any]:
    """The slide's regions, and its ink, as GeoJSON in level-0 pixels."""
    areas = slide.regions() + ([("pen", slide.pen)] if slide.pen is not None else [])
    return {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "geometry": mapping(area),
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": label, "color": list(_COLOURS[label])},
                },
            }
            for label, area in areas
        ],
    }


def captions(slide: SlidePhantom, count: int, side: int) -> list[dict[str, Any]]:
    """Captioned patches as PathGen-1.6M lists them."""
    file = str(uuid.uuid5(uuid.NAMESPACE_URL, slide.name))
    return [
        {
            "wsi_id": slide.name,
            "position": [str(x), str(y)],
            "caption": slide.captions(x, y, side)[0],
            "file_id": file,
            "label": name,
            "patient": slide.patient,
        }
        for x, y, name in slide.positions(count, side)
    ]


def _claim(folder: Path, recipe: dict[str, Any]) -> None:
    """Make the folder, or see that it holds slides of the same recipe."""
    mark = folder / "recipe.json"
    try:
        for name in ("slides", "truth"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if mark.exists() and json.loads(mark.read_text()) != recipe:
            raise UserError(f"{folder} holds slides of another recipe ({mark}): choose another folder")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{mark} is no JSON: remove it, or choose another folder") from None
    _replace(mark, json.dumps(recipe))


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())

"""Write any source as shards in BIOMEDICA's layout, in parallel; a killed run goes on where it was.

    python scripts/make_shards.py --table pairs.jsonl --out shards/ --per-shard 200 --split-by case --fraction 0.2

    python scripts/make_shards.py --table pathgen.jsonl --slide-root slides/ --size 336 --mpp 0.5 --out shards/

With `--split-by` the parts go to `OUT/train` and `OUT/test`, and no group is in both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medclip.data.make_shards import make_shards
from medclip.data.sources import open_sources
from medclip.phantoms.phantom import KINDS
from medclip.types import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--table", help="CSV, TSV, JSONL, JSON or parquet that names images and captions")
    given.add_argument("--folder", help="images below it, with .txt captions or in class folders")
    given.add_argument("--urls", help="shards: glob, brace range or URL")
    given.add_argument("--phantoms", choices=KINDS, help="generated images of this kind")
    given.add_argument("--slides", help="patches of whole slides: folder, pattern, or CSV with a column path")
    parser.add_argument("--slide-root", help="slides that the rows of a --table in PathGen's layout are patches of")
    parser.add_argument("--mpp", type=float, default=0.5, help="µm a pixel of patches of slides (%(default)s)")
    parser.add_argument("--samples", type=int, default=1000, help="generated images (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels of generated images and patches (%(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument("--per-shard", type=int, default=10_000, help="samples in a shard (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="shards written at a time (%(default)s)")
    parser.add_argument("--image-root", help="folder of a table's images (the table's own)")
    parser.add_argument("--suffix", help="ending to append to a table's image names")
    parser.add_argument(
        "--caption", action="append", help="field of the caption; several times: the first that is there"
    )
    parser.add_argument("--no-caption", action="store_true", help="write images and metadata only")
    parser.add_argument("--filter", help="expression on the metadata")
    parser.add_argument("--keep", help="list of keys: .parquet (column key), .npy or .txt")
    parser.add_argument("--split-by", help="field whose values are never split, e.g. case; `key` for every sample")
    parser.add_argument("--fraction", type=float, default=0.2, help="of the groups in the test part (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, or of generated images (%(default)s)")
    chosen = parser.parse_args()
    options = ("table", "folder", "urls", "image_root", "suffix", "filter", "keep")
    config = {name: value for name in options if (value := getattr(chosen, name)) is not None}
    if chosen.phantoms:
        recipe = {"kind": chosen.phantoms, "samples": chosen.samples, "size": chosen.size, "seed": chosen.seed}
        config["phantoms"] = recipe
    if chosen.slide_root and not chosen.table:
        parser.error("--slide-root goes with --table")
    if chosen.slides or chosen.slide_root:
        patches = {"size": chosen.size, "mpp": chosen.mpp}
        where = {"table": config.pop("table"), "root": chosen.slide_root} if chosen.slide_root else {}
        config["slides"] = (where or {"cohort": chosen.slides}) | patches
    if chosen.no_caption:
        config["caption"] = False
    elif chosen.caption:
        config["caption"] = {"fields": chosen.caption, "choose": "first"}
    parts = [(chosen.out, {})]
    if chosen.split_by:
        split = {"by": chosen.split_by, "fraction": chosen.fraction, "seed": chosen.seed}
        parts = [(chosen.out / part, {"split": split | {"part": part}}) for part in ("train", "test")]
    try:
        for folder, extra in parts:
            source = open_sources([config | extra])[0]
            done = make_shards(source, folder, samples_per_shard=chosen.per_shard, processes=chosen.processes)
            print(f"{folder}: {done.samples} samples in {done.shards} shards, {done.skipped} skipped")
    except UserError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Features of slide patches with any open_clip or timm model; a killed run goes on where it was, inside a slide too.

    python scripts/extract_features.py --cohort slides.csv --out features --clip models/mine
    python scripts/extract_features.py --cohort slides/ --out features --timm vit_small_patch16_224 --weights vit.pt
    python scripts/extract_features.py --cohort slides/ --out f --coords clam/patches --layout clam --clip models/mine

`--coords` takes the patches of CLAM, TRIDENT or extract_patches.py instead of finding new ones. On several GPUs give
each process its --device and its --part I N.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # its neighbour, when it is run as a file

from extract_patches import add_cohort, add_request, entries_of, request_of, tell_failures

from medclip.extract import write_pt
from medclip.models.patches import PatchEncoder, clip_encoder, timm_encoder
from medclip.types import UserError
from slides.errors import SlideError
from slides.features import FeatureOutput, extract_features
from slides.run import split_cores


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_cohort(parser)
    add_request(parser)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--clip", help="checkpoint, open_clip folder or hf-hub:org/name")
    model.add_argument("--timm", help="name of a timm model")
    parser.add_argument("--weights", help="of the timm model, instead of a download")
    parser.add_argument("--name", help="of the features' folder (the model's)")
    parser.add_argument("--device", default="auto", help="cuda:1, cpu… (%(default)s)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="patches at once (%(default)s)")
    parser.add_argument("--block", type=int, default=4096, help="features written at a time (%(default)s)")
    parser.add_argument("--format", choices=("h5", "zarr"), default="h5", help="%(default)s")
    parser.add_argument("--coords", help="folder of coordinates to take features at")
    return parser


def encoder_of(chosen: argparse.Namespace) -> PatchEncoder:
    from medclip.evaluate import pick_device

    options = {"name": chosen.name, "device": pick_device(chosen.device), "precision": chosen.precision}
    if chosen.clip:
        return clip_encoder(chosen.clip, **options)
    return timm_encoder(chosen.timm, weights=chosen.weights, **options)


def main() -> int:
    chosen = arguments().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        request, entries = request_of(chosen), entries_of(chosen)
        output = FeatureOutput(
            str(chosen.out), chosen.layout, chosen.format, chosen.batch_size, chosen.block, chosen.coords
        )
        report = extract_features(
            entries,
            request,
            output,
            encoder_of(chosen),
            threads=chosen.threads or split_cores(1)[1],
            written_one=write_pt if chosen.layout == "clam" else None,
        )
    except (SlideError, UserError) as error:
        print(f"extract_features: {error}", file=sys.stderr)
        return 2
    tell_failures("extract_features", report.rows)
    counts = {
        status: sum(row["status"] == status for row in report.rows) for status in {r["status"] for r in report.rows}
    }
    print(json.dumps(counts | {"waiting": round(report.waiting, 4)}))
    return 0 if any(row["status"] in ("ok", "empty") for row in report.rows) else 2


if __name__ == "__main__":
    sys.exit(main())

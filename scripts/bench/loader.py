"""Loader: images per CPU-second from shards on disk to normalised batches, against open_clip 3.3's own pipeline.

    scripts/bench/loader.py [--quick]

Both sides read the same shards (JPEGs of 512 to 1024 px, a caption and 4 kB of metadata each), decode, cut a random 0.9
to 1.0 of the image, resize it to 224 px, tokenise the caption, batch 64 and normalise, with 2 workers; a second table
has the same without workers (not with --quick). The peer is `open_clip_train.data.get_wds_dataset` with open_clip's
transform, tokenizer and default arguments. It needs webdataset <= 0.2.86, which is installed for it alone, into
.venv/bench-peer, when first needed. Our tar index is made beforehand, as a run makes it once for a data set; what it
costs is printed.

The pixels are compared too: the fast path and `decode: exact` with open_clip's own operations on the same boxes.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from _timing import Cost, arguments, interleave, measure, report, table

ROOT = Path(__file__).resolve().parents[2]
SHARDS = ROOT / ".venv" / "bench-shards"
PEER = ROOT / ".venv" / "bench-peer"
PEER_PACKAGES = ("webdataset==0.2.86", "braceexpand")
PER_SHARD = 128
BATCH = 64
TOWER = {"width": 64, "layers": 1}
MAX_DRIFT = 1.0  # mean difference to the exact path, in levels of 255


# --- shards --------------------------------------------------------------------------------------------------------


def write_shards(count: int) -> list[Path]:
    """The first `count` shards of the benchmark's data set, made once."""
    SHARDS.mkdir(parents=True, exist_ok=True)
    paths = [SHARDS / f"{number:05d}.tar" for number in range(count)]
    if missing := [path for path in paths if not path.is_file()]:
        print(f"writing {len(missing)} shards of {PER_SHARD} images to {SHARDS.relative_to(ROOT)}", flush=True)
    for path in missing:
        part = path.with_suffix(f".{os.getpid()}.part")
        rng = np.random.default_rng(int(path.stem))
        fields = _fields(rng)
        with tarfile.open(part, "w") as tar:
            for i in range(PER_SHARD):
                meta = {"article_text": _caption(rng, 500), "license": "CC BY", "image_set": path.stem}
                members = {"jpg": _jpeg(rng, fields), "txt": _caption(rng), "json": json.dumps(meta).encode()}
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{path.stem}-PMC{i:06d}-0-fig.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        part.replace(path)
    return paths


def _fields(rng: np.random.Generator, size: int = 1280, number: int = 6) -> np.ndarray:
    """Random (number, size, size) of unit variance, smooth as photographs are: amplitudes fall with frequency."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.standard_normal((number, size, size), dtype=np.float32))
    fields = np.fft.irfft2(noise / frequency**1.3, s=(size, size))
    return (fields / fields.std(axis=(1, 2), keepdims=True)).astype(np.float32)


def _jpeg(rng: np.random.Generator, fields: np.ndarray) -> bytes:
    """A picture of 512 to 1024 px a side: smooth texture, cells or organs with sharp borders, a little sensor noise."""
    import cv2

    height, width = (int(rng.integers(512, 1025)) for _ in range(2))
    if max(height, width) > 1.6 * min(height, width):
        height = width = max(height, width)
    top, left = (int(rng.integers(0, fields.shape[1] - side + 1)) for side in (height, width))
    light, red, blue = fields[rng.permutation(len(fields))[:3], top : top + height, left : left + width]
    tint = rng.uniform(90, 190, 3).astype(np.float32)
    picture = tint + rng.uniform(16, 32) * light[..., None]
    picture[..., 0] += 8 * red
    picture[..., 2] += 8 * blue
    shapes = np.zeros((height, width, 3), dtype=np.uint8)
    for _ in range(int(rng.integers(10, 80))):
        centre = int(rng.integers(width)), int(rng.integers(height))
        axes = tuple(int(side) for side in rng.integers(4, 60, 2))
        colour = tuple(int(value) for value in rng.integers(10, 90, 3))
        cv2.ellipse(shapes, centre, axes, float(rng.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_AA)
    picture = picture - shapes + rng.normal(0, rng.uniform(0, 1), (height, width, 1)).astype(np.float32)
    quality = int(rng.choice([75, 75, 80, 90]))
    pixels = np.clip(picture, 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


_PLAIN, _STEMS, _ENDS = (
    line.split()
    for line in (
        "the of and in with showing a arrow image patient axial scan left right section stained high power view mass "
        "after before contrast enhanced lesion cells tumor normal control group arrowheads indicate bar scale",
        "cardi hepat nephr oste neur derm gastr pulmon encephal arthr my angi cyt hist aden lip fibr chondr",
        "itis oma osis opathy ology al ectomy ogram oid ic ocyte oblast omegaly algia",
    )
)
_MARKS = ("(A)", "(B)", "H&E", "×400", "50 µm", "12.5 mm", "p < 0.05,", "T2-weighted", "CT.", "MRI,", "Fig. 3.")


def _caption(rng: np.random.Generator, words: int | None = None) -> Any:
    """Words as figure captions have them; bytes for a caption of 8 to 80 words, a string of `words` words else."""
    found = []
    for kind in rng.random(words or int(rng.integers(8, 80))):
        if kind < 0.55:
            found.append(_PLAIN[int(rng.integers(len(_PLAIN)))])
        elif kind < 0.97:
            found.append(_STEMS[int(rng.integers(len(_STEMS)))] + _ENDS[int(rng.integers(len(_ENDS)))])
        else:
            found.append(_MARKS[int(rng.integers(len(_MARKS)))])
    text = " ".join(found).capitalize() + "."
    return text if words else text.encode()


# --- the two sides, each in a process of its own -------------------------------------------------------------------


def ours(shards: list[Path], workers: int) -> Callable[[], int]:
    """Our loader, and the normalisation that a model of ours does on its device."""
    import torch

    from medclip.data.crop import RandomCrop
    from medclip.data.ledger import Ledger
    from medclip.data.order import EpochOrder, Part, Plan
    from medclip.data.pairs import PairLoader, PairReader
    from medclip.data.sources import open_sources, open_storage
    from medclip.models.load import load_clip

    model = load_clip({"embed_dim": 8, "vision_cfg": TOWER | {"patch_size": 32}, "text_cfg": TOWER})  # for its pixels

    def work() -> int:
        storage = open_storage()
        config = {"urls": [str(path) for path in shards]}
        (source,) = sources = open_sources([config], index=SHARDS / "index", storage=storage)
        reader = PairReader(
            sources,
            [source.caption],
            model.preprocess,
            model.tokenizer,
            RandomCrop(),
            seed=0,
            batch_size=BATCH,
            storage=storage,
        )
        order = EpochOrder([Part(len(source), source.chunks)], seed=0)
        seen = 0
        for batch in PairLoader(reader, order, Plan(BATCH), Ledger(None, max_bad_fraction=0.0), workers=workers):
            assert "image" in batch and "text" in batch and "key" in batch
            image = model.normalise(batch["image"])
            assert image.dtype == torch.float32 and batch["text"].shape == (BATCH, 77)
            seen += len(batch["key"])
        return seen

    return work


def peer(shards: list[Path], workers: int) -> Callable[[], int]:
    """open_clip's pipeline as its `main` builds it for `--dataset-type webdataset`."""
    import open_clip
    import torch
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.main import random_seed
    from open_clip_train.params import parse_args

    pattern = f"{shards[0].parent}/{{{shards[0].stem}..{shards[-1].stem}}}.tar"
    flags = f"--model ViT-B-32 --batch-size {BATCH} --workers {workers} --train-num-samples {PER_SHARD * len(shards)}"
    args = parse_args([*flags.split(), "--train-data", pattern])
    args.world_size, args.rank, args.distributed = 1, 0, False
    aug_cfg = open_clip.AugmentationCfg(**args.aug_cfg)
    transform = open_clip.image_transform(224, is_train=True, aug_cfg=aug_cfg)
    tokenizer = open_clip.get_tokenizer(args.model)

    def work() -> int:
        random_seed(args.seed)
        seen = 0
        for image, text in get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer).dataloader:
            assert image.dtype == torch.float32 and text.shape == (BATCH, 77)
            seen += len(image)
        return seen

    return work


def serve(side: str, count: int) -> None:
    """Answer each line on stdin, a number of workers, with the cost of one run."""
    shards = write_shards(count)
    for line in sys.stdin:
        work = {"ours": ours, "peer": peer}[side](shards, int(line))
        cost = measure(work)
        print(json.dumps([cost.cpu, cost.wall, cost.units]), flush=True)


@contextmanager
def process(side: str, count: int) -> Iterator[Callable[[int], Cost]]:
    """A process that runs one side; called with a number of workers, it gives the cost of a run."""
    path = os.pathsep.join([str(ROOT), *([str(PEER)] if side == "peer" else [])])
    child = subprocess.Popen(
        [sys.executable, __file__, "--side", side, "--count", str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert child.stdin is not None and child.stdout is not None
    stdin, stdout = child.stdin, child.stdout

    def run(workers: int) -> Cost:
        print(workers, file=stdin, flush=True)
        if not (line := stdout.readline()):
            sys.exit(f"loader: the {side} process ended with status {child.wait()}")
        return Cost(*json.loads(line))

    try:
        yield run
    finally:
        stdin.close()
        child.wait()


def install_peer() -> None:
    """webdataset as open_clip 3.3 needs it, where only the peer's process sees it."""
    if (PEER / "webdataset").is_dir():
        return
    with tempfile.TemporaryDirectory(dir=PEER.parent) as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *PEER_PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            sys.exit(f"loader: cannot install the peer ({' '.join(PEER_PACKAGES)}; is there a network?): {why}")
        Path(folder).rename(PEER)
        Path(folder).mkdir()  # for its manager to remove


# --- pixels --------------------------------------------------------------------------------------------------------


def compare_pixels(shards: list[Path], number: int) -> tuple[float, int]:
    """(mean difference of the fast path in levels of 255, images whose exact path differs at all), over `number`."""
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    from medclip.data.crop import RandomCrop
    from medclip.data.decode import read_image
    from medclip.types import Preprocess

    preprocess, crop = Preprocess(), RandomCrop()
    drift, unequal = [], 0
    for i, data in zip(range(number), _jpegs(shards), strict=False):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box = crop.sample(image.height, image.width, np.random.default_rng(i))
        cut: Any = image  # Pillow's, which torchvision takes too, but does not say
        theirs = np.asarray(resized_crop(cut, *box, [*preprocess.size], InterpolationMode.BICUBIC))
        fast, exact = (
            read_image(data, preprocess, crop=crop, rng=np.random.default_rng(i), exact=how) for how in (False, True)
        )
        drift.append(np.abs(fast.astype(np.int16) - theirs).mean())
        unequal += not np.array_equal(exact, theirs)
    return float(np.mean(drift)), unequal


def _jpegs(shards: list[Path]) -> Iterator[bytes]:
    for path in shards:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg") and (file := tar.extractfile(member)):
                    yield file.read()


def index_cost(shards: list[Path]) -> Cost:
    from medclip.data.sources import open_sources

    with tempfile.TemporaryDirectory() as folder:
        return measure(lambda: len(open_sources([{"urls": [str(path) for path in shards]}], index=folder)[0]))


def main() -> None:
    args = arguments(__doc__, side="", count="0")
    if args.side:
        return serve(args.side, int(args.count))
    install_peer()
    count = 4 if args.quick else 16
    shards = write_shards(count)
    sizes = [len(data) for data in _jpegs(shards)]
    print(f"{len(sizes)} images, mean {np.mean(sizes) / 1000:.0f} kB, in {count} shards")
    drift, unequal = compare_pixels(shards, 128 if args.quick else 512)
    print(
        f"pixel drift of the fast path: {drift:.2f}/255 (limit 1/255); images not equal under decode: exact: {unequal}"
    )
    index = index_cost(shards)
    print(f"tar index, once for a data set: {1000 * index.each:.3f} CPU-ms/image")
    if drift > MAX_DRIFT or unequal:
        sys.exit("loader: the pixels are not what they should be, so the speed means nothing")
    with process("ours", count) as our, process("peer", count) as their:
        if not args.quick:
            alone = interleave(lambda: our(0), lambda: their(0), runs=3)
            print(f"without workers:\n{table(alone, 'image', 'open_clip-3.3')}", flush=True)
        pairs = interleave(lambda: our(2), lambda: their(2), runs=5)
    print("2 workers:")
    report("loader", pairs, unit="image", peer="open_clip-3.3")


if __name__ == "__main__":
    main()

"""The viewer under load: 20 people pan over a slide and ask for maps, against a real server on a real socket.

    scripts/bench/viewer.py [--quick]

A slide of 40,000 x 30,000 pixels (JPEG tiles of 256 px, levels 1, 4 and 16) and 15,000 features of 512 numbers are
written once to a folder that is removed at the end; the server is `medclip serve` in a process of its own, with a CLIP
whose text tower has ViT-B/32's size and random weights. Each viewer has six connections, as a browser has: it looks at
a screenful of 20 tiles somewhere at some zoom, waits until all are there, looks for a moment, and goes on; after every
fifth screen it types a text that nobody has typed before and waits for the map's numbers and its picture. Every answer
must be 200 and a JPEG or PNG. Times are what the client saw, so they hold the client's own share of the machine.

There is no peer: the targets are 60 ms for tiles and 1 s for maps, both the 95th percentile on two cores.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import httpx
import numpy as np
from _timing import arguments

sys.path.remove(str(Path(__file__).resolve().parent))  # where slides.py is a benchmark, and not the package
from medclip.models.folder import write_folder
from medclip.models.load import load_clip
from medclip.models.patches import fingerprint
from slides.pyramid import Mosaic, mirrored

VIEWERS, CONNECTIONS, SCREEN, SIZE, SIDE = 20, 6, (5, 4), (40_000, 30_000), 256
THINK = (1.0, 3.0)  # seconds that a person looks at a screen
TEXT = {  # ViT-B/32's text tower; the image tower is not used
    "embed_dim": 512,
    "vision_cfg": {"image_size": 32, "patch_size": 32, "layers": 1, "width": 64, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
TILE, MAP = 0.060, 1.0  # targets, seconds


@dataclass
class Seen:
    """What the viewers saw, in seconds."""

    tiles: list[float] = field(default_factory=list)
    maps: list[float] = field(default_factory=list)
    retried: int = 0


def prepare(folder: Path, patches: int) -> None:
    """Write the slide, the model and the features."""
    rng = np.random.default_rng(0)
    fields = [mirrored(rng.integers(90, 250, (512, 512, 3)).astype(np.uint8)) for _ in range(2)]
    smooth = [np.asarray(np.clip(f // 2 + np.array([110, 60, 90], np.uint8), 0, 255), np.uint8) for f in fields]
    regions = rng.integers(0, 2, (-(-SIZE[1] // 2048), -(-SIZE[0] // 2048)))
    (folder / "slides").mkdir()
    Mosaic(regions, 2048, smooth, SIZE).write(folder / "slides" / "bench.svs", mpp=0.25)
    write_folder(load_clip(TEXT), folder / "model", title="bench")
    clip = load_clip(pretrained=str(folder / "model")).eval()
    columns, rows = SIZE[0] // SIDE, SIZE[1] // SIDE
    places = np.sort(rng.choice(columns * rows, min(patches, columns * rows), replace=False))
    coords = np.stack([places % columns, places // columns], 1) * SIDE
    (folder / "features_model").mkdir()
    with h5py.File(folder / "features_model" / "bench.h5", "w") as file:
        data = file.create_dataset("features", data=rng.normal(size=(len(coords), 512)).astype(np.float32))
        data.attrs.update({"encoder": "model", "weights": fingerprint(clip, clip.preprocess), "name": "bench"})
        file.create_dataset("coords", data=coords.astype(np.int64)).attrs["patch_size_level0"] = SIDE


async def tile(client: httpx.AsyncClient, path: str, seen: Seen) -> None:
    begun = time.perf_counter()
    answer = await client.get(path)
    while answer.status_code == 503:  # as the page does
        seen.retried += 1
        await asyncio.sleep(0.7)
        answer = await client.get(path)
    assert answer.status_code == 200 and answer.content[:2] == b"\xff\xd8", f"{path}: {answer.status_code}"
    seen.tiles.append(time.perf_counter() - begun)


async def ask(client: httpx.AsyncClient, text: str, seen: Seen) -> None:
    begun = time.perf_counter()
    words = {"model": "checkpoint", "prompt": text}
    for path, start in (("map", b"{"), ("map.png", b"\x89PNG")):
        answer = await client.get(f"/api/slides/bench/{path}", params=words)
        assert answer.status_code == 200 and answer.content.startswith(start), f"{path}: {answer.status_code}"
    seen.maps.append(time.perf_counter() - begun)


async def viewer(number: int, address: str, screens: int, seen: Seen) -> None:
    """One person."""
    rng = random.Random(number)
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60) as client:
        row = (await client.get("/api/slides/bench")).json()
        busy = asyncio.Semaphore(CONNECTIONS)  # so that waiting for a connection of one's own is not the server's time

        async def get(path: str) -> None:
            async with busy:
                await tile(client, path, seen)

        await asyncio.sleep(rng.uniform(0, THINK[1]))
        for screen in range(screens):
            level = rng.randint(row["first"] + 2, row["last"])
            down = 2 ** (row["last"] - level)
            columns, rows = (-(-side // (down * row["tile"])) for side in SIZE)
            left, top = rng.randint(0, max(columns - SCREEN[0], 0)), rng.randint(0, max(rows - SCREEN[1], 0))
            places = [
                (column, line)
                for line in range(top, min(top + SCREEN[1], rows))
                for column in range(left, min(left + SCREEN[0], columns))
            ]
            await asyncio.gather(*(get(f"/api/slides/bench/tiles/{level}/{c}_{r}.jpg") for c, r in places))
            if screen % 5 == number % 5:
                await ask(client, f"tissue number {number} of screen {screen}", seen)
            await asyncio.sleep(rng.uniform(*THINK))


async def load(address: str, screens: int) -> Seen:
    seen = Seen()
    await asyncio.gather(*(viewer(number, address, screens, seen) for number in range(VIEWERS)))
    return seen


def percentile(values: list[float], share: int) -> float:
    return statistics.quantiles(values, n=100)[share - 1]


def start(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """The server, and where it listens."""
    words = [f"cohort={folder}/slides", f"features={folder}", f"checkpoint={folder}/model", "port=0"]
    command = [sys.executable, "-m", "medclip.cli", "serve", *words]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("open "):
            return running, line.split()[1].rstrip("/")
    sys.exit("viewer: the server did not start")


def main() -> None:
    args = arguments(__doc__)
    runs, screens = (1, 8) if args.quick else (5, 15)
    found: list[Seen] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, 15_000)
        for run in range(runs):
            server, address = start(folder)  # a fresh one: nothing is in its memory
            try:
                begun = time.perf_counter()
                seen = asyncio.run(load(address, screens))
                seconds = time.perf_counter() - begun
            finally:
                server.send_signal(signal.SIGINT)
                server.wait(20)
            found.append(seen)
            print(
                f"run {run + 1}: {len(seen.tiles)} tiles ({len(seen.tiles) / seconds:.0f}/s): "
                f"p50 {1000 * percentile(seen.tiles, 50):.1f} ms, p95 {1000 * percentile(seen.tiles, 95):.1f} ms; "
                f"{len(seen.maps)} maps: p50 {1000 * percentile(seen.maps, 50):.0f} ms, "
                f"p95 {1000 * percentile(seen.maps, 95):.0f} ms; {seen.retried} told to come again",
                flush=True,
            )
    tiles = [percentile(seen.tiles, 95) for seen in found]
    maps = [percentile(seen.maps, 95) for seen in found]
    print(f"{VIEWERS} viewers, {os.cpu_count()} cores: tile p95 {1000 * statistics.median(tiles):.1f} ms (target 60), "
          f"map p95 {1000 * statistics.median(maps):.0f} ms (target 1000)")  # fmt: skip
    for name, values, target in (("viewer_maps", maps, MAP), ("viewer", tiles, TILE)):
        ratios = [target / value for value in values]
        print(
            f"{name} ratio={statistics.median(ratios):.3f} min={min(ratios):.3f} max={max(ratios):.3f} "
            f"peer=target-{1000 * target:.0f}ms",
            flush=True,
        )


if __name__ == "__main__":
    main()

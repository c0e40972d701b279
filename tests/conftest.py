"""Small real things that several tests use: shards on disk, and a run of `medclip train` on them."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import orjson
import pytest
from PIL import Image

WORDS = ("nuclei", "stroma", "lung", "CT", "MRI", "fracture", "normal", "biopsy", "axial", "left", "right", "mass")


def jpeg(rng: np.random.Generator, width: int = 80, height: int = 64) -> bytes:
    """A smooth random picture."""
    small = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, "jpeg", quality=90)
    return out.getvalue()


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> None:
    """`samples` hold `key` and then extension -> content."""
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for extension, content in sample.items():
                if extension == "key":
                    continue
                info = tarfile.TarInfo(f"{sample['key'].decode()}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 37, 5, 20 and 3 pairs in BIOMEDICA's layout; 65 pairs, keys with dots and dashes."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for shard, count in enumerate((37, 5, 20, 3)):
        samples = []
        for i in range(count):
            caption = f"{' '.join(rng.choice(WORDS, 4))} {shard}-{i}."
            meta = {"image_primary_label": ["Microscopy" if i % 2 else "Clinical Imaging"], "patient": f"p{i % 7}"}
            samples.append(
                {
                    "key": f"{shard}-PMC{shard:03d}{i:02d}-{i}-fig.{i}".encode(),
                    "jpg": jpeg(rng),
                    "txt": caption.encode(),
                    "json": orjson.dumps(meta),
                }
            )
        write_tar(folder / f"{shard:05d}.tar", samples)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory):
    """Indexes and disk caches of the tests stay out of the user's."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("WANDB_MODE", "offline")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def browser():
    """Chromium, as the machine has it."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((path for name in names if (path := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=flags)
        yield opened
        opened.close()

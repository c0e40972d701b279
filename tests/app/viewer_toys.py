"""A small cohort for the viewer: slides, a CLIP, and features in which a text's place is known."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import torch

from medclip.app.features import FeatureStore, find_sets
from medclip.app.limits import Limits
from medclip.app.texts import Texts, embed_captions
from medclip.app.viewer import Viewer
from medclip.infer.zeroshot import embed_texts
from medclip.models.clip import Clip
from medclip.models.load import load_clip
from slides.cohort import read_cohort
from tests.slides.toys import AWKWARD_NAME, break_header, toy_slide, truncate

SIDE = 100
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "layers": 1, "width": 16, "heads": 2},
}
AWKWARD = AWKWARD_NAME.removesuffix(".svs")


def tiny_clip(seed: int = 0) -> Clip:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return load_clip(ARCHITECTURE).eval()


def grid(width: int = 1000, height: int = 800) -> np.ndarray:
    """int64 (80, 2): corners of patches that cover a toy slide."""
    y, x = np.mgrid[0:height:SIDE, 0:width:SIDE]
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.int64)


def write_features(path: Path, features: np.ndarray, coords: np.ndarray, **about: object) -> Path:
    """A file as TRIDENT has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("features", data=features.astype(np.float32))
        data.attrs.update({"encoder": "tiny", "name": path.stem} | about)
        corners = file.create_dataset("coords", data=coords)
        corners.attrs.update({"patch_size_level0": SIDE, "name": path.stem})
    return path


def planted(clip: Clip, text: str, row: int, seed: int, count: int = 80) -> np.ndarray:
    """float32 (count, 16): random, not of unit norm; row `row` points where the text does."""
    features = np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)
    features[row] = 3 * embed_texts(clip, [text])[0].numpy()
    return features


def write_cohort(folder: Path, clip: Clip) -> None:
    """slides/: one, an awkward name, a damaged tile, a file that breaks off; features_tiny/ of the first two.

    "tumour" is patch 42 of `one` (x 200, y 400) and patch 7 of the awkward one (x 700, y 0).
    """
    for seed, name in enumerate(("one.svs", AWKWARD_NAME, "damaged.svs", "half.svs")):
        toy_slide(folder / "slides" / name, downsamples=(1, 4), seed=seed)
    break_header(folder / "slides" / "damaged.svs")
    truncate(folder / "slides" / "half.svs", 0.3)
    for seed, (name, row) in enumerate((("one", 42), (AWKWARD, 7))):
        write_features(folder / "features_tiny" / f"{name}.h5", planted(clip, "tumour", row, seed), grid())


def toy_viewer(folder: Path, clip: Clip, *, captions: list[str] | None = None, **limits: int) -> Viewer:
    """Of `write_cohort`'s folder."""
    (found,) = find_sets(folder)
    small = Limits(**({"renders": 2, "maps": 2, "gallery": 5} | limits))
    return Viewer(
        read_cohort(str(folder / "slides")),
        FeatureStore({"tiny": found}, small.feature_bytes),
        Texts({"tiny": clip}),
        {},
        embed_captions(captions or [], {"tiny": clip}),
        small,
    )

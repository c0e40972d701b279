"""The readers on real images, where the sample data lies beside the checkout; skipped elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medclip.data.crop import RandomCrop
from medclip.data.decode import read_image
from medclip.data.make_shards import make_shards
from medclip.data.sources import open_sources
from medclip.types import Preprocess

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not beside the checkout")

TABLES = {
    "medpix_large": ("pairs.jsonl", True, 1440),
    "medpix_pairs": ("pairs.jsonl", True, 40),  # PNG with an alpha channel
    "openstax_anatomy_large": ("pairs.jsonl", True, 660),
    "cxr_large": ("labels.jsonl", False, 279),
    "lc25000_lung": ("labels.jsonl", False, 738),
    "wbc_dataset1": ("labels.jsonl", False, 100),  # BMP
}


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_a_table_and_every_tenth_image(name: str) -> None:
    table, captions, count = TABLES[name]
    (source,) = open_sources([{"table": str(DATA / name / table), "caption": captions}])
    assert (len(source), source.problems) == (count, [])
    for i in range(0, len(source), 10):
        sample = source.read(i)
        image = read_image(sample.image, Preprocess(size=(96, 96)))
        assert image.shape == (96, 96, 3) and image.std() > 1
        assert not captions or sample.text


def test_a_case_is_in_one_part_only(tmp_path: Path) -> None:
    table = str(DATA / "medpix_large" / "pairs.jsonl")
    parts = [
        open_sources([{"table": table, "split": {"by": "case", "part": part, "seed": 1}}], index=tmp_path)[0]
        for part in ("train", "test")
    ]
    cases = [{part.fields(i)["case"] for i in range(len(part))} for part in parts]
    assert not cases[0] & cases[1] and len(cases[0] | cases[1]) == 479
    assert sum(map(len, parts)) == 1440


def test_shards_of_real_pairs_are_the_pairs(tmp_path: Path) -> None:
    config = {"table": str(DATA / "openstax_anatomy" / "pairs.jsonl")}
    (source,) = open_sources([config])
    make_shards(source, tmp_path / "shards", samples_per_shard=4)
    (back,) = open_sources([{"urls": f"{tmp_path}/shards"}], index=tmp_path / "index")
    assert len(back) == len(source) == 10
    for i in range(10):
        one, two = source.read(i), back.read(i, want_meta=True)
        assert (one.image, one.text, one.meta) == (two.image, two.text, two.meta)


def test_fast_decoding_drifts_less_than_a_level(tmp_path: Path) -> None:
    (source,) = open_sources([{"table": str(DATA / "openstax_anatomy_large" / "pairs.jsonl")}])
    drifts = []
    for i in range(0, len(source), 20):
        data = source.read(i).image
        fast, exact = (
            read_image(data, Preprocess(), crop=RandomCrop(), rng=np.random.default_rng(i), exact=exact)
            for exact in (False, True)
        )
        drifts.append(np.abs(fast.astype(int) - exact).mean())
    assert np.mean(drifts) < 1

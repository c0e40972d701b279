from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from medclip.app.texts import Captions, Texts, embed_captions, read_captions
from medclip.types import UserError
from tests.app.viewer_toys import tiny_clip


def test_tables_of_captions(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": ["a", "b", "c", "d"], "caption": ["gland", "  two\nlines ", None, "gland"]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        assert read_captions(tmp_path / name, 100) == ["gland", "two lines"]
        assert read_captions(tmp_path / name, 1) == ["gland"]
    frame.rename(columns={"caption": "x"}).to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(UserError, match=r"columns image, x, none of them caption"):
        read_captions(tmp_path / "b.csv", 9)
    (tmp_path / "c.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"cannot be read"):
        read_captions(tmp_path / "c.parquet", 9)


def test_nearest_captions_are_those_of_the_highest_cosine() -> None:
    vectors = torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(0).normal(size=(50, 8))).float())
    captions = Captions([f"c{i}" for i in range(50)], {"m": vectors.half()})
    wanted = torch.topk(vectors @ vectors[7], 3)
    found = captions.nearest("m", vectors[7], 3)
    assert [text for text, _ in found] == [f"c{i}" for i in wanted.indices.tolist()] and found[0][0] == "c7"
    np.testing.assert_allclose([score for _, score in found], wanted.values, atol=1e-3)


def test_a_text_is_the_model_s_own_and_computed_once() -> None:
    clip = tiny_clip()
    texts = Texts({"tiny": clip})
    with torch.inference_mode():
        wanted = clip.encode_text(clip.tokenizer(["tumour"]))[0]
    assert torch.allclose(texts.vector("tiny", "tumour"), wanted, atol=1e-6)
    assert texts.vector("tiny", "tumour") is texts.vector("tiny", "tumour")
    assert embed_captions(["tumour"], {"tiny": clip}).nearest("tiny", wanted, 5)[0][1] == pytest.approx(1, abs=1e-3)

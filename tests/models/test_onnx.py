"""ONNX towers in onnxruntime, the tokenizer in `tokenizers`: without torch and open_clip, the same features and ids."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medclip.models.bpe import bpe_tokenizer
from medclip.models.load import load_clip
from medclip.models.mae import MaeShape, mae_from
from medclip.models.onnx import check_onnx, write_onnx
from medclip.models.tokenizer import BpeTokenizer
from medclip.models.vit import Classifier, VitShape
from medclip.types import Preprocess, UserError

onnxruntime = pytest.importorskip("onnxruntime")
TEXTS = ["no effusion", "x ray of the left lung with a nodule", "", "ct " * 60]
PIXELS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


class OutsideReader:
    """What a user without torch does: numpy, onnxruntime and tokenizers, by what `onnx.json` says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / "onnx.json").read_text())

    def run(self, tower: str, values: np.ndarray) -> np.ndarray:
        entry = self.about[tower]
        session = onnxruntime.InferenceSession(str(self.folder / entry["file"]), providers=["CPUExecutionProvider"])
        assert entry["shape"][1:] == list(values.shape[1:]) and entry["dtype"] == str(values.dtype)
        return session.run([entry["output"]], {entry["input"]: values})[0]

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """Unit-norm features of uint8 (b, 3, h, w)."""
        mean, std = (np.array(self.about["preprocess"][k], np.float32).reshape(3, 1, 1) for k in ("mean", "std"))
        return self.run("image", (pixels.astype(np.float32) / 255 - mean) / std)

    def ids(self, texts: list[str]) -> np.ndarray:
        from tokenizers import Tokenizer

        how = self.about["tokenizer"]
        reader = Tokenizer.from_file(str(self.folder / how["file"]))
        rows = np.full((len(texts), how["context_length"]), how["pad_id"], np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = reader.encode(text).ids
            if len(ids) > len(row):
                ids = [*ids[: len(row) - 1], ids[-1]]
            row[: len(ids)] = ids
        return rows


def assert_same(theirs: np.ndarray, ours: torch.Tensor) -> None:
    assert theirs.shape == tuple(ours.shape)
    assert np.abs(theirs - ours.numpy()).max() <= 1e-4
    cosine = (theirs * ours.numpy()).sum(1) / np.linalg.norm(theirs, axis=1) / ours.norm(dim=1).numpy()
    assert cosine.min() > 0.99999


def check_clip(cfg: dict, folder: Path) -> None:
    torch.manual_seed(0)
    clip = load_clip(cfg, preprocess=PIXELS).eval()
    with torch.no_grad():
        clip.logit_scale.fill_(2.0)
    assert write_onnx(clip, folder) <= 1e-4
    reader = OutsideReader(folder)
    pixels = torch.randint(0, 256, (7, 3, *clip.preprocess.size), dtype=torch.uint8)
    for rows in (pixels[:1], pixels):
        with torch.no_grad():
            assert_same(reader.image(rows.numpy()), clip.encode_image(rows))
    ids = reader.ids(TEXTS)
    assert np.array_equal(ids, clip.tokenizer(TEXTS).numpy())
    for chosen in (ids[:1], ids):
        with torch.no_grad():
            assert_same(reader.run("text", chosen), clip.encode_text(torch.from_numpy(chosen)))
    assert reader.about["logit_scale"] == pytest.approx(np.e**2)


def test_vit(vit_cfg: dict, tmp_path: Path) -> None:
    check_clip(vit_cfg, tmp_path)


def test_bert(bert_cfg: dict, tmp_path: Path, no_network: None) -> None:
    check_clip(bert_cfg, tmp_path)


def timm_cfg(name: str, size: int, pool: str, **text: Any) -> dict:
    vision = {"image_size": size, "timm_model_name": name, "timm_pool": pool, "timm_proj": "linear"}
    words = {"context_length": 16, "vocab_size": 49408, "layers": 1, "width": 32, "heads": 2, **text}
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": words, "custom_text": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg",
    [
        pytest.param(timm_cfg("convnext_atto", 64, ""), id="convnext"),
        pytest.param(timm_cfg("vitamin_small_224", 224, ""), id="vitamin"),
        pytest.param(timm_cfg("fastvit_mci0", 256, "avg", no_causal_mask=True), id="mobileclip"),
        pytest.param(timm_cfg("resnet10t", 64, "avg"), id="resnet10t"),
        pytest.param(timm_cfg("vit_tiny_patch16_224", 224, "avg"), id="timm-vit"),
    ],
)
def test_towers_of_timm(cfg: dict, tmp_path: Path) -> None:
    check_clip(cfg, tmp_path)


@pytest.mark.slow
def test_openais_resnet_and_quick_gelu(vit_cfg: dict, tmp_path: Path) -> None:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}
    check_clip(vit_cfg | {"vision_cfg": vision, "quick_gelu": True}, tmp_path)


@pytest.mark.slow
def test_siglip_and_its_bias(siglip_cfg: dict, tmp_path: Path) -> None:
    check_clip(siglip_cfg, tmp_path)
    assert json.loads((tmp_path / "onnx.json").read_text())["logit_bias"] == -10.0


def classifier() -> Classifier:
    torch.manual_seed(0)
    shape = VitShape(image_size=32, patch_size=8, dim=32, depth=2, heads=2)
    model = Classifier(shape, ["edema", "mass"], Preprocess.from_dict({**PIXELS, "size": 32}))
    torch.nn.init.normal_(model.net.head.weight)
    return model


def test_classifier(tmp_path: Path) -> None:
    model = classifier()
    write_onnx(model, tmp_path)
    reader = OutsideReader(tmp_path)
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        np.testing.assert_allclose(reader.run("classifier", image.numpy()), model.eval()({"image": image}), atol=1e-4)
    assert reader.about["classes"] == ["edema", "mass"]


@pytest.mark.slow
def test_encoder_of_a_masked_autoencoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = MaeShape(image_size=32, patch_size=8, dim=32, depth=2, heads=2, decoder_dim=16, decoder_heads=2)
    model = mae_from({"shape": vars(shape), "preprocess_cfg": Preprocess.from_dict({"size": 32}).as_dict()}).eval()
    write_onnx(model, tmp_path)
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tokens = model.encode({"image": image})
    found = OutsideReader(tmp_path).run("encoder", image.numpy())
    assert found.shape == (3, 17, 32)
    np.testing.assert_allclose(found, tokens, atol=1e-4)


def test_another_models_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What onnxruntime does not reproduce never passes."""
    kept = torch.onnx.export

    def harmed(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
        other = classifier()
        with torch.no_grad():
            other.net.patch_embed.proj.weight.mul_(1.01)
        module.__dict__["function"] = lambda image: other.eval()({"image": image})
        program = kept(module, *args, **options)
        module.__dict__["function"] = lambda image: model({"image": image})
        return program

    model = classifier()
    monkeypatch.setattr(torch.onnx, "export", harmed)
    with pytest.raises(RuntimeError, match="onnxruntime computes another model from classifier"):
        write_onnx(model, tmp_path)


def test_no_onnx_no_such_opset(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="opset=11: choose 18 to 21"):
        check_onnx(11)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'medclip-adapt\[onnx\]'"):
        check_onnx(18)


@pytest.mark.parametrize("clean", ["lower", "whitespace"])
def test_tokenizer_json_has_open_clips_ids(clean: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    written = tokenizers.Tokenizer.from_str(json.dumps(bpe_tokenizer(clean)))
    ours = BpeTokenizer(77, clean)
    texts = [
        "  H&E\tstain\n 40× ",
        "it's the patient's, they'll",
        "α-β 12,5 µm; <b>",
        "Ähnlich ß İ 中文",
        "“curly” ‘q’",
        "",
    ]
    for text in [*texts, "e\u0301", "1234 T1-weighted (C+)", "don’t"]:
        assert written.encode(text).ids == [49406, *ours.encode(text), 49407], text
    with pytest.raises(UserError, match="canonicalize"):
        bpe_tokenizer("canonicalize")

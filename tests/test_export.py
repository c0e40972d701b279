"""`medclip export` from checkpoint files: folders, blends, scored sweeps, and one line for what is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import load_file

from medclip.config import CONF
from medclip.export import export, main
from medclip.models.clip import Clip
from medclip.models.load import load_clip
from medclip.models.mae import build_mae
from medclip.models.vit import build_vit
from medclip.models.wiseft import blend
from medclip.types import UserError
from tests.models.test_hub import Hub

CFG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 64},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "layers": 1, "width": 32, "heads": 2},
}


class ToyEvaluation:
    """A "metric" that any blend of two models has: one coordinate of one text's feature."""

    def __init__(self, name: str) -> None:
        self.name, self.data = name, range(1)

    def __call__(self, clip: Clip, *, batch_size: int, workers: int, advance: object) -> SimpleNamespace:
        with torch.no_grad():
            value = float(clip.encode_text(clip.tokenizer(["a nodule"]))[0, 0])
        metrics = {"acc1": value, "auroc": float("nan")}
        headline = ("acc1", "auroc")
        return SimpleNamespace(metrics=metrics, headline=headline, role="domain", lower_is_better=frozenset())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two Lightning checkpoints of one architecture: base and adapted."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for name in ("base", "tuned"):
        clip = load_clip(CFG)
        state = {f"model.{key}": value for key, value in clip.state_dict().items()}
        torch.save({"state_dict": state, "medclip": clip.description}, folder / f"{name}.ckpt")
    return folder / "base.ckpt", folder / "tuned.ckpt"


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return compose("export", list(overrides))


def state(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "open_clip_model.safetensors")


def test_checkpoint_becomes_a_folder(checkpoints: tuple[Path, Path], tmp_path: Path):
    (folder,) = export(config(f"checkpoint={checkpoints[1]}", f"output={tmp_path / 'model'}"))
    trained = load_clip(pretrained=str(checkpoints[1])).net.state_dict()
    written = state(folder)
    assert written.keys() == trained.keys() and all(torch.equal(written[key], trained[key]) for key in written)
    assert "tuned.ckpt" in (folder / "README.md").read_text()
    with pytest.raises(UserError, match="is not empty"):
        export(config(f"checkpoint={checkpoints[1]}", f"output={tmp_path / 'model'}"))


def test_one_blend(checkpoints: tuple[Path, Path], tmp_path: Path):
    base, tuned = checkpoints
    (folder,) = export(config(f"checkpoint={tuned}", f"base={base}", "alpha=0.3", f"output={tmp_path / 'blend'}"))
    expected = blend(*(load_clip(pretrained=str(path)).net.state_dict() for path in checkpoints), alpha=0.3)
    assert all(torch.equal(value, expected[key]) for key, value in state(folder).items())
    assert "alpha=0.3" in (folder / "README.md").read_text()


def test_scored_sweep(checkpoints: tuple[Path, Path], tmp_path: Path):
    base, tuned = checkpoints
    cfg = config(
        *(f"checkpoint={tuned}", f"base={base}", "alpha=[0,0.25,1]", f"output={tmp_path / 'sweep'}"),
        *(f"+evals.toy._target_={__name__}.ToyEvaluation", "metric=toy/acc1", "device=cpu"),
    )
    folders = export(cfg)
    assert [folder.name for folder in folders] == ["alpha_0", "alpha_0.25", "alpha_1"]
    for end, source in ((folders[0], base), (folders[2], tuned)):
        exact = load_clip(pretrained=str(source)).net.state_dict()
        assert all(value.numpy().tobytes() == exact[key].numpy().tobytes() for key, value in state(end).items())

    found = json.loads((tmp_path / "sweep" / "wiseft.json").read_text())
    values = {row["alpha"]: row["metrics"]["toy/acc1"] for row in found["alphas"]}
    for folder in folders:
        again = load_clip(pretrained=str(folder)).eval()
        value = float(again.encode_text(again.tokenizer(["a nodule"]))[0, 0])
        assert values[float(folder.name.removeprefix("alpha_"))] == pytest.approx(value, abs=1e-6)
    assert found["best"]["alpha"] == max(values, key=lambda alpha: values[alpha])
    assert found["alphas"][0]["metrics"]["toy/auroc"] is None
    assert found["tradeoff"] == []  # nothing is to be retained here
    assert (tmp_path / "sweep" / "wiseft.png").read_bytes().startswith(b"\x89PNG")


def test_masked_autoencoder_gets_the_published_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(0)
    shape: dict[str, Any] = {"image_size": 32, "patch_size": 8, "dim": 16, "depth": 1, "heads": 2}
    shape |= {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
    mae = build_mae(**shape, preprocess={"mean": [0.5] * 3, "std": [0.25] * 3})
    checkpoint = tmp_path / "last.ckpt"
    weights = {f"model.{key}": value for key, value in mae.state_dict().items()}
    torch.save({"state_dict": weights, "medclip": mae.description, "optimizer_states": [{}]}, checkpoint)

    words = [f"checkpoint={checkpoint}", f"output={tmp_path / 'mae'}"]
    with pytest.raises(UserError, match="is a masked autoencoder, which is not blended"):
        export(config(*words, f"base={checkpoint}", "alpha=0.5"))
    (folder,) = export(config(*words))
    assert "std [0.25, 0.25, 0.25]" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path != checkpoint] == ["mae"]

    # As in the published files of MAE and of Medical MAE.
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    layered = [f"{blocks}.0.{layer}" for blocks in ("blocks", "decoder_blocks") for layer in layers]
    layered += ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    names = {f"{layer}.{kind}" for layer in layered for kind in ("weight", "bias")}
    names |= {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    content = torch.load(folder / "mae.pth", weights_only=True)
    assert content.keys() == {"model"} and content["model"].keys() == names
    again = build_mae(**shape, pretrained=str(folder / "mae.pth")).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in mae.state_dict().items())
    with pytest.raises(UserError, match="is not empty"):
        export(config(*words))

    torch.save({"state_dict": weights, "medclip": {"kind": "mae"}}, checkpoint)
    with pytest.raises(UserError, match="does not describe its masked autoencoder"):
        export(config(f"checkpoint={checkpoint}", f"output={tmp_path / 'other'}"))
    assert not (tmp_path / "other").exists()


def test_classifier_becomes_a_folder_of_timms(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = build_vit(["edema", "mass"], image_size=32, patch_size=8, dim=16, depth=1, heads=2)
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "medclip": model.description}, tmp_path / "last.ckpt")
    words = [f"checkpoint={tmp_path / 'last.ckpt'}", f"output={tmp_path / 'model'}"]
    with pytest.raises(UserError, match="is a classifier, which is not blended"):
        export(config(*words, f"base={tmp_path / 'last.ckpt'}", "alpha=0.5"))
    (folder,) = export(config(*words))
    assert "read back by timm" in capsys.readouterr().out
    written = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, written[key.removeprefix("net.")]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "kind, use",
    [
        ("vqa", r"is a VQA model, .* not exported: medclip evaluate eval=\[vqa\] .* model\.types="),
        ("vqa_text", r"answers in words, .* not exported: medclip evaluate eval=\[vqa\]"),
        ("dae", r"denoising auto-encoder, .* pretrained= takes it"),
        ("maml", r"meta-learned net, .* pretrained= takes it"),
    ],
)
def test_what_no_other_program_reads(kind: str, use: str, tmp_path: Path):
    torch.save({"state_dict": {}, "medclip": {"kind": kind}}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=use):
        export(config(f"checkpoint={tmp_path / 'last.ckpt'}", f"output={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_onnx_beside_the_weights_and_to_a_hub(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("onnxruntime")
    hub = Hub()
    monkeypatch.setattr("medclip.models.hub.HfApi", lambda: hub)
    words = [f"checkpoint={checkpoints[1]}", f"output={tmp_path / 'model'}"]
    export(config(*words, "onnx=true", "push=hf-hub:org/toy"))
    assert hub.made[0]["private"] is True
    assert {"onnx/image.onnx", "onnx/text.onnx", "onnx/onnx.json", "onnx/tokenizer.json"} < set(hub.sent)
    assert "open_clip_model.safetensors" in hub.sent and "onnxruntime" in capsys.readouterr().out

    # The reader in docs/export.md, without torch and open_clip, gets the model's logits.
    snippet = re.findall(r"```python\n(.*?)```", (CONF.parent / "docs" / "export.md").read_text(), re.DOTALL)[0]
    found: dict[str, Any] = {}
    exec(snippet.replace("models/mine", str(tmp_path / "model")), found)
    clip = load_clip(pretrained=str(checkpoints[1])).eval()
    black, texts = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), clip.tokenizer(["no finding", "pleural effusion"])
    with torch.no_grad():
        out = clip({"image": black, "text": texts})
        logits = out.logit_scale * out.image_features @ out.text_features.T
    assert found["logits"] == pytest.approx(logits.numpy(), abs=1e-3)

    # What a hub refuses is known before anything is written.
    monkeypatch.setattr("medclip.models.hub.HfApi", lambda: Hub(["README.md"]))
    with pytest.raises(UserError, match="holds 1 files already"):
        export(config(f"checkpoint={checkpoints[1]}", f"output={tmp_path / 'other'}", "push=hf-hub:org/toy"))
    assert not (tmp_path / "other").exists()


def test_nothing_is_pushed_unasked(checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("medclip.models.hub.HfApi", lambda: pytest.fail("asked a hub"))
    export(config(f"checkpoint={checkpoints[1]}", f"output={tmp_path / 'model'}"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["alpha=0.5"], "a blend needs both base="),
        (["base=x.ckpt"], "a blend needs both base="),
        (["base=x.ckpt", "alpha=1.5"], "alpha=1.5 is outside 0..1"),
        (["base=x.ckpt", "alpha=[0,half]"], "alpha=half is outside 0..1"),
        (["base=x.ckpt", "alpha=0.5"], "checkpoint x.ckpt does not exist"),
        (["+evals.toy._target_=x"], "evaluations score a sweep"),
        (["base=x.ckpt", "alpha=[0,1]", "metric=toy/acc1"], "is of no configured evaluation"),
        (["base=x.ckpt", "alpha=[0,1]", "push=hf-hub:a/b"], "choose one alpha for push="),
        (["push=me"], "push=me names no repository"),
        (["onnx=true", "opset=7"], "opset=7: choose 18 to 21"),
        (["results=nowhere.json"], "results=nowhere.json cannot be read"),
    ],
)
def test_bad_words(words: list[str], message: str, checkpoints: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(UserError, match=message):
        export(config(f"checkpoint={checkpoints[1]}", f"output={tmp_path / 'x'}", *words))
    assert not (tmp_path / "x").exists()


def test_base_of_another_architecture(checkpoints: tuple[Path, Path], tmp_path: Path):
    other = load_clip(CFG | {"embed_dim": 16})
    content = {"state_dict": {f"model.{k}": v for k, v in other.state_dict().items()}, "medclip": other.description}
    torch.save(content, tmp_path / "other.ckpt")
    words = [f"checkpoint={checkpoints[1]}", f"base={tmp_path / 'other.ckpt'}", "alpha=0.5", f"output={tmp_path / 'x'}"]
    with pytest.raises(UserError, match="base is another model than checkpoint: they differ in embed_dim"):
        export(config(*words))


def test_a_multirun_writes_numbered_folders(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, tuned = checkpoints
    monkeypatch.chdir(tmp_path)
    words = ["-m", f"checkpoint={tuned}", f"base={base}", "alpha=0,1", "output=blends"]
    monkeypatch.setattr(sys, "argv", ["medclip export", *words])
    main()
    for number, source in enumerate(checkpoints):
        exact = load_clip(pretrained=str(source)).net.state_dict()
        written = state(tmp_path / "blends" / str(number))
        assert all(torch.equal(written[key], exact[key]) for key in exact)


def test_command_line_says_one_line(tmp_path: Path):
    words = ["export", f"checkpoint={tmp_path}", f"output={tmp_path / 'x'}"]
    run = subprocess.run([sys.executable, "-m", "medclip.cli", *words], capture_output=True, text=True)
    assert run.returncode == 2
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    assert lines == [f"medclip export: folder {tmp_path} is no open_clip model: it has no open_clip_config.json"]

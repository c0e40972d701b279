"""Loading from every kind of source, and the refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from medclip.models.folder import write_folder
from medclip.models.load import load_clip
from medclip.types import Preprocess, UserError

TOWERS = {"embed_dim": 8, "vision_cfg": {"layers": 1}, "text_cfg": {"layers": 1}}
SIGLIP_PIXELS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash", "interpolation": "bicubic"}


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def folder(siglip_cfg: dict, tmp_path: Path) -> Path:
    """An open_clip folder as its authors publish it: no size in preprocess_cfg, a weights file, no tokenizer files."""
    torch.manual_seed(1)
    model = load_clip(siglip_cfg, preprocess=SIGLIP_PIXELS)
    folder = tmp_path / "published"
    folder.mkdir()
    config = {"model_cfg": siglip_cfg, "preprocess_cfg": SIGLIP_PIXELS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.net.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def _save_checkpoint(clip: torch.nn.Module, path: Path) -> Path:
    state = {f"model.{key}": value for key, value in clip.state_dict().items()}
    torch.save({"state_dict": state | {"teacher.x": torch.ones(1)}, "medclip": clip.description, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_folder_loads_as_open_clip_loads_it(folder: Path, prefix: str, no_network: None):
    ours = load_clip(pretrained=f"{prefix}{folder}").eval()
    theirs = open_clip.create_model(f"local-dir:{folder}")
    theirs.eval()
    assert same_state(ours.net, theirs)
    assert ours.preprocess == Preprocess.from_dict(theirs.visual.preprocess_cfg)
    assert ours.preprocess.resize_mode == "squash" and ours.preprocess.size == (32, 32)
    texts = ["a nodule", "no finding"]
    assert torch.equal(ours.tokenizer(texts), open_clip.get_tokenizer(f"local-dir:{folder}")(texts))
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours.encode_image(image), theirs.encode_image(image, normalize=True))
    assert load_clip(f"local-dir:{folder}").preprocess == ours.preprocess


def test_folder_with_hf_text_tower_needs_no_network(
    bert_cfg: dict, bert_folder: Path, tmp_path: Path, no_network: None
):
    first = load_clip(bert_cfg)
    folder = tmp_path / "model"
    write_folder(first, folder, title="toy")
    moved = folder.rename(tmp_path / "moved")  # what plain open_clip cannot do
    again = load_clip(pretrained=str(moved))
    assert same_state(first.net, again.net)
    texts = ["left lung nodule", ""]
    assert torch.equal(first.tokenizer(texts), again.tokenizer(texts))


def test_folder_without_the_text_models_config_says_so(bert_cfg: dict, tmp_path: Path, no_network: None):
    folder = tmp_path / "model"
    write_folder(load_clip(bert_cfg), folder, title="toy")
    (folder / "config.json").unlink()
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "somebody/text-model"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"text model somebody/text-model .* put its config\.json into the folder"):
        load_clip(pretrained=str(folder))


def test_checkpoint_is_rebuilt_from_itself_alone(any_cfg: dict, tmp_path: Path, no_network: None):
    torch.manual_seed(2)
    first = load_clip(any_cfg, preprocess={"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"})
    text_cfg = first.description["model_cfg"]["text_cfg"]
    for key in {"hf_model_name", "hf_tokenizer_name"} & text_cfg.keys():
        text_cfg[key] = "/nowhere"  # the folders that it was built from are gone on another machine
    path = _save_checkpoint(first, tmp_path / "last.ckpt")
    again = load_clip(pretrained=str(path))
    assert same_state(first.net, again.net)
    assert again.preprocess == first.preprocess
    assert again.description == first.description
    texts = ["left lung nodule", "μm"]
    assert torch.equal(again.tokenizer(texts), first.tokenizer(texts))


def test_weights_files_of_every_kind(vit_cfg: dict, tmp_path: Path):
    model = load_clip(vit_cfg)
    state = model.net.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.bin")
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "c.pt")
    for name in ("a.safetensors", "b.bin", "c.pt"):
        assert same_state(load_clip(vit_cfg, str(tmp_path / name)).net, model.net)


def test_clip_weights_into_a_siglip_layout(vit_cfg: dict, tmp_path: Path):
    """Old layout -> `text.` layout, and the missing bias starts at zero, as in open_clip."""
    save_file(load_clip(vit_cfg).net.state_dict(), tmp_path / "clip.safetensors")
    cfg = vit_cfg | {"custom_text": True, "init_logit_bias": -10.0}
    ours = load_clip(cfg, str(tmp_path / "clip.safetensors"))
    net = open_clip.CustomTextCLIP(**{k: v for k, v in cfg.items() if k != "custom_text"})
    open_clip.load_checkpoint(net, str(tmp_path / "clip.safetensors"))
    assert same_state(ours.net, net)
    assert ours.net.logit_bias is not None and ours.net.logit_bias.item() == 0


def test_image_size_resizes_the_positional_embedding_as_open_clip_does(vit_cfg: dict, tmp_path: Path):
    model = load_clip(vit_cfg)
    write_folder(model, tmp_path / "m", title="toy")
    ours = load_clip(pretrained=str(tmp_path / "m"), image_size=64)
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'm'}", force_image_size=64)
    assert same_state(ours.net, theirs)
    assert ours.preprocess.size == (64, 64)
    path = _save_checkpoint(ours, tmp_path / "large.ckpt")
    assert load_clip(pretrained=str(path)).preprocess.size == (64, 64)


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("name", ["w.bin", "w.pt", "w.ckpt"])
def test_pickled_code_is_refused_and_never_run(
    name: str, vit_cfg: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"x": _Evil()}, "medclip": {}}, tmp_path / name)
    with pytest.raises(UserError, match="holds more than tensors"):
        load_clip(None if name.endswith("ckpt") else vit_cfg, str(tmp_path / name))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["w.bin", "w.safetensors", "w.ckpt"])
def test_damaged_file_is_one_line(name: str, vit_cfg: dict, tmp_path: Path):
    (tmp_path / name).write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match="cannot read weights from") as error:
        load_clip(None if name.endswith("ckpt") else vit_cfg, str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("files", [{"../evil.json": "{}"}, {"modeling.py": "x"}, {"config.json": '{"auto_map": {}}'}])
def test_checkpoint_cannot_write_elsewhere_nor_bring_code(files: dict, vit_cfg: dict, tmp_path: Path):
    clip = load_clip(vit_cfg)
    clip.description["files"] = files
    with pytest.raises(UserError, match=r"which is not one of|code of its own"):
        load_clip(pretrained=str(_save_checkpoint(clip, tmp_path / "x.ckpt")))


def test_a_damaged_text_file_of_a_model_is_one_line(vit_cfg: dict, tmp_path: Path):
    clip = load_clip(vit_cfg)
    clip.description["files"] = {"tokenizer_config.json": '{"cut": '}
    with pytest.raises(UserError, match=r"tokenizer_config\.json of this model is no JSON"):
        load_clip(pretrained=str(_save_checkpoint(clip, tmp_path / "x.ckpt")))


def test_unfitting_weights_name_the_keys(vit_cfg: dict, tmp_path: Path):
    state = load_clip(vit_cfg).net.state_dict()
    del state["ln_final.weight"]
    state |= {"surplus": torch.ones(1), "visual.proj": torch.ones(64, 8)}
    save_file(state, tmp_path / "w.safetensors")
    message = r"lacks ln_final\.weight, has a surplus surplus, has visual\.proj of \(64, 8\) instead of \(64, 32\)"
    with pytest.raises(UserError, match=message):
        load_clip(vit_cfg, str(tmp_path / "w.safetensors"))


# The preprocessing belongs to the weights


def test_weights_beside_another_preprocessing_are_refused(siglip_cfg: dict, folder: Path):
    weights = str(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match=r"lies beside .* mean=\[0\.5, 0\.5, 0\.5\].*pretrained=.*published"):
        load_clip(siglip_cfg, weights)
    with pytest.raises(UserError, match=r"lies beside .* resize_mode=squash"):
        load_clip(siglip_cfg, weights, preprocess=SIGLIP_PIXELS | {"resize_mode": "shortest"})
    assert load_clip(siglip_cfg, weights, preprocess=SIGLIP_PIXELS).preprocess.resize_mode == "squash"
    assert load_clip(None, weights).preprocess.mean == (0.5, 0.5, 0.5)


def test_explicit_preprocessing_must_be_the_folders(folder: Path):
    with pytest.raises(UserError, match=r"preprocess\.std=.* contradicts .*published.*leave `preprocess` out"):
        load_clip(pretrained=str(folder), preprocess={"std": [0.26, 0.26, 0.27]})
    with pytest.raises(UserError, match="image_size="):
        load_clip(pretrained=str(folder), preprocess={"size": 64})
    with pytest.raises(UserError, match=r"unknown key preprocess\.sdt"):
        load_clip(pretrained=str(folder), preprocess={"sdt": [0.5, 0.5, 0.5]})
    assert load_clip(pretrained=str(folder), preprocess={"std": [0.5, 0.5, 0.5], "size": 32}).preprocess.std[0] == 0.5


def test_bare_weights_of_an_architecture_whose_tags_disagree_need_words(tmp_path: Path):
    """Published ViT-L-14 weights use two different normalisations: a bare file may be either."""
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"does not say how its images were made.*preprocess="):
        load_clip("ViT-L-14", str(tmp_path / "w.safetensors"))


def test_a_bare_architecture_gets_the_preprocessing_of_its_published_weights():
    from medclip.models.source import _usual_preprocess

    pixels, agreed = _usual_preprocess("ViT-B-16-SigLIP")
    assert agreed and pixels.mean == (0.5, 0.5, 0.5) and pixels.resize_mode == "squash"
    assert _usual_preprocess("ViT-B-32") == (Preprocess(), True)
    assert _usual_preprocess("ViT-L-14") == (Preprocess(), False)


# One line for what the user can mend


@pytest.mark.parametrize(
    "architecture, pretrained, message",
    [
        ("ViT-B32", None, r"unknown architecture 'ViT-B32': did you mean ViT-B-32"),
        ("vit-b-16-siglp", None, "did you mean ViT-B-16-SigLIP"),
        ("ViT-B-32", "laion2b_s34b_b79", "is no file, folder or tag of ViT-B-32; tags: laion2b_s34b_b79k"),
        ("ViT-B-32", "openai", "say architecture=ViT-B-32-quickgelu"),
        (None, None, "no model given"),
        (None, "laion2b_s34b_b79k", "needs the name of its architecture="),
        (None, "nowhere/last.ckpt", "checkpoint nowhere/last.ckpt does not exist"),
        (None, "local-dir:nowhere", "folder nowhere does not exist"),
        ({"embed_dim": 8, "vision_cfg": {}}, None, "lacks `text_cfg`"),
        (TOWERS | {"vision_cfg": {"witdh": 3}}, None, "unknown key `witdh` in vision_cfg"),
        (TOWERS | {"vision_cfg": 3}, None, "vision_cfg of the model configuration is 3"),
        (TOWERS | {"surprise": 1}, None, "open_clip cannot build .*surprise"),
        (TOWERS | {"multimodal_cfg": {}}, None, "CoCa"),
    ],
)
def test_bad_words(architecture: object, pretrained: str | None, message: str):
    with pytest.raises(UserError, match=message) as error:
        load_clip(architecture, pretrained)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_folders_that_are_no_open_clip_model(folder: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is no open_clip model: it has no open_clip_config\.json"):
        load_clip(pretrained=str(tmp_path / "empty"))
    (folder / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_clip(pretrained=str(folder))
    for content in ("{", "[]", '{"vision_cfg": {}}'):
        (folder / "open_clip_config.json").write_text(content)
        with pytest.raises(UserError, match="is no open_clip configuration"):
            load_clip(pretrained=str(folder))


def test_architecture_beside_a_model_that_describes_itself_must_agree(
    vit_cfg: dict, siglip_cfg: dict, folder: Path, tmp_path: Path
):
    load_clip(siglip_cfg, str(folder))
    with pytest.raises(UserError, match=r"init_logit_bias.* differ\): say architecture=null"):
        load_clip(vit_cfg, str(folder))
    path = tmp_path / "bare.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="no checkpoint of `medclip train`"):
        load_clip(pretrained=str(path))

"""`medclip train adapt=[…]` as users run it: killed and resumed to the bit, then loaded, evaluated and exported."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from hydra import compose, initialize_config_dir

from medclip.config import CONF
from medclip.evaluate import evaluate
from medclip.export import export
from medclip.models.load import load_clip
from medclip.train import train
from medclip.types import UserError
from tests.tasks.test_runs import stream

WORDS = [
    "experiment=tiny",
    "model=tiny_vit",
    "model.architecture.vision_cfg.layers=2",
    "model.architecture.text_cfg.layers=2",
    "data.sources=[{phantoms: {kind: xray, samples: 20, size: 64}}]",
    "data.batch_size=8",
    "data.workers=0",
    "epochs=2",
    "callbacks=[default,stream]",
    "callbacks.checkpoint.every_n_steps=2",
]
ADAPTED = {
    "lora": ["adapt=[lora,checkpointing]", "adapt.lora.rank=2", "adapt.lora.dropout=0.2"],
    "lock": ["adapt=[lock_image,patch_dropout]", "adapt.lock_image.blocks=1", "optim=clip_layerwise"],
}


def run(*words: str) -> None:
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        train(compose("train", [*WORDS, *words]))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    run(f"output={folder}", "max_steps=1")
    return folder / "checkpoints/last.ckpt"


@pytest.fixture(scope="module", params=ADAPTED)
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base: Path
) -> tuple[list[str], Path]:
    words = [*ADAPTED[request.param], "model=local", f"model.pretrained={base}"]
    words = [word for word in WORDS if not word.startswith("model")] + words
    folder = tmp_path_factory.mktemp(request.param)
    again(words, f"output={folder}")
    return words, folder


def again(words: list[str], *more: str) -> None:
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        train(compose("train", [*words, *more]))


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_killed_and_resumed_is_the_same_run(whole: tuple[list[str], Path], tmp_path: Path):
    """The same dropout of the adapters and of patches; what is frozen is the base's to the bit."""
    words, folder = whole
    with pytest.raises(SystemExit):
        again(words, f"output={tmp_path}", "+callbacks.die._target_=tests.tasks.test_runs.Killed")
    again(words, f"output={tmp_path}", "resume=auto")
    assert len(stream(folder)) == 6 and stream(folder) == stream(tmp_path)
    one, other = state(folder), state(tmp_path)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_whatever_was_trained_is_evaluated_exported_and_trained_on(
    whole: tuple[list[str], Path], base: Path, tmp_path: Path
):
    words, folder = whole
    last = folder / "checkpoints/last.ckpt"
    before, after = load_clip(pretrained=str(base)).net.state_dict(), load_clip(pretrained=str(last)).net.state_dict()
    assert before.keys() == after.keys()
    assert load_clip(pretrained=str(last)).description.keys() == load_clip(pretrained=str(base)).description.keys()
    frozen = ["visual.conv1.weight", "visual.transformer.resblocks.0.ln_1.weight"]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(
        before["transformer.resblocks.1.attn.in_proj_weight"], after["transformer.resblocks.1.attn.in_proj_weight"]
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        told = compose(
            "evaluate",
            [
                f"checkpoints={{base: {base}, adapted: {last}}}",
                "eval=[phantom_xray_retrieval]",
                "evals.phantom_xray_retrieval.data.sources=[{phantoms: {kind: xray, samples: 12, size: 64, seed: 2}}]",
                "workers=0",
                "bootstrap.samples=100",
                f"output={tmp_path}/report",
            ],
        )
        written = compose("export", [f"checkpoint={last}", f"base={base}", "alpha=1", f"output={tmp_path}/model"])
    evaluate(told)
    export(written)
    net = open_clip.create_model(f"local-dir:{tmp_path}/model")
    assert all(torch.equal(value, after[name]) for name, value in net.state_dict().items())
    again(words, f"model.pretrained={last}", f"output={tmp_path}/on", "max_steps=1")


def test_a_resume_with_other_parts_free_is_refused_in_one_line(base: Path, tmp_path: Path):
    run("adapt=[lora]", f"output={tmp_path}", "max_steps=1")
    with pytest.raises(UserError, match=r"cannot resume: .* \(lora\.rank: 16 there, 4 here\)"):
        run("adapt=[lora]", f"output={tmp_path}", "resume=auto", "adapt.lora.rank=4")
    with pytest.raises(UserError, match=r"cannot resume: .* \(lora: "):
        run(f"output={tmp_path}", "resume=auto")
    run("adapt=[lock_text]", f"output={tmp_path}/lock", "max_steps=1")
    with pytest.raises(UserError, match=r"cannot resume: .* \(locked\.text\.blocks: 0 there, 1 here\)"):
        run("adapt=[lock_text]", f"output={tmp_path}/lock", "resume=auto", "adapt.lock_text.blocks=1")

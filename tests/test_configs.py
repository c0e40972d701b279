"""Every shipped config composes, and every experiment takes two steps on generated pairs. By glob, never by list."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from medclip.config import CONF
from medclip.train import train
from tests.models.language_toys import language_folder

VERBS = sorted(path.stem for path in CONF.glob("*.yaml"))
# Sweeps are W&B's to read: tests/test_sweeps.py; the launcher is Hydra's own: tests/callbacks/test_slurm.py.
ELSEWHERE = ("sweep", "launcher")
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml") if path.parent.name not in ELSEWHERE)
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
TINY = [
    "data.batch_size=4",
    "data.workers=0",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.strategy=auto",
    "trainer.precision=32-true",
    "epochs=2",
]
PHANTOMS = "{phantoms: {kind: xray, samples: 12, size: 64, seed: %d}}"
# What makes an experiment small, by what makes its model.
TOYS = {
    "medclip.models.load.load_clip": [
        "model=tiny_vit",
        "model.architecture.vision_cfg.layers=1",
        "model.architecture.text_cfg.layers=1",
        "model.pretrained=null",
        f"data.sources=[{PHANTOMS % 0}]",
    ],
    "medclip.models.mae.build_mae": [
        "model=mae_tiny",
        f"data.sources=[{PHANTOMS % 0}]",
        "data.val_sources=[]",
        "data.group=null",
    ],
    "medclip.models.vit.build_vit": [
        "model=vit_tiny",
        f"data.sources=[{PHANTOMS % 0}]",
        f"data.val_sources=[{PHANTOMS % 1}]",
        "data.labels={names: [pneumothorax, cardiomegaly], from: class, field: phantom.label, other: zeros}",
        "data.group=phantom.patient",
        "task.lr_batch=null",
    ],
    "medclip.models.dae.build_dae": [f"data.sources=[{PHANTOMS % 0}]"],
    "medclip.models.maml.build_maml": [
        *("data.ways=2", "data.shots=1", "data.queries=1", "data.episodes=4", "data.val_episodes=1"),
        *("model.image_size=32", "task.inner_steps=1"),
        "data.sources=[{phantoms: {kind: questions, samples: 48, size: 64, seed: 0}}]",
        "data.val_sources=[{phantoms: {kind: questions, samples: 48, size: 64, seed: 1}}]",
        "data.labels={names: [disc, square, triangle], field: phantom.attributes.shape}",
    ],
    "medclip.models.vqa.build_vqa": [
        "data.sources=[{phantoms: {kind: questions, samples: 8, size: 64, seed: 0}}]",
        "data.val_sources=[{phantoms: {kind: questions, samples: 4, size: 64, seed: 1}}]",
    ],
}
TOYS["medclip.models.mil.build_mil"] = [
    *("data.patches=8", "data.folds=3", "trainer.accumulate_grad_batches=1"),
    "data.phantoms={slides: 24, patches: 12, dim: 8, rare: 0.2, seed: 0, target: ${data.target}}",
]
TOYS["medclip.models.generate.build_generate"] = [
    *TOYS["medclip.models.vqa.build_vqa"],
    *("model/visual=maml", "model.length=16", "model.answer_length=3"),
]
QUESTIONS = {
    "medclip.models.question_rnn.QuestionRnn": ["model.questions.hidden=8", "model.questions.embedding=6"],
    "medclip.models.question_clip.QuestionClip": [
        "model.questions.clip.architecture={embed_dim: 16, vision_cfg: {image_size: 32, patch_size: 16, layers: 1, "
        "width: 32, head_width: 16}, text_cfg: {context_length: 16, vocab_size: 49408, layers: 1, width: 16, "
        "heads: 2}}",
        "model.questions.clip.pretrained=null",
    ],
}


def composed(name: str, *words: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(words))


@pytest.mark.parametrize("name", VERBS)
def test_verbs_compose(name: str) -> None:
    assert OmegaConf.to_yaml(composed(name))


@pytest.mark.parametrize("path", [path for path in FILES if len(path.parts) > 1], ids=str)
def test_groups_compose_and_name_things_that_exist(path: Path) -> None:
    group, choice = path.parent.as_posix(), path.stem
    verb = {
        "eval": "evaluate",
        "suite": "evaluate",
        "slides": "extract",
        "encoder": "extract",
        "source": "heatmap",
    }.get(group, "train")
    value = f"[{choice}]" if group in ("loss", "eval", "logger", "callbacks") else choice
    group = f"+{group}" if "/" in group else group  # a part that only some choices have: model/visual
    cfg = composed(verb, f"{group}={value}")
    for target in targets(OmegaConf.to_container(cfg, resolve=False)):
        assert callable(get_object(target)), target


def targets(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if isinstance(node.get("_target_"), str) else []
        return own + [target for value in node.values() for target in targets(value)]
    return [target for value in node for target in targets(value)] if isinstance(node, list) else []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_run(name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    shipped = composed("train", f"experiment={name}")
    toy = [*TOYS[shipped.model._target_]]
    if "questions" in shipped.model:
        toy += QUESTIONS[shipped.model.questions._target_]
        toy += [] if shipped.model.visual is None else ["model/visual=maml"]  # the cheapest
    if len(shipped.data.get("val_sources", ())) and not any(word.startswith("data.val_sources") for word in toy):
        toy.append(f"data.val_sources=[{PHANTOMS % 1}]")
    if "language" in shipped.model:
        pytest.importorskip("transformers")
        toy.append(f"model.language.folder={language_folder(tmp_path_factory.mktemp('language'))}")
    if "text_tower" in shipped.adapt:  # of a model that must be fetched; see tests/models/test_text_tower.py
        toy.append("~adapt.text_tower")
    trainer = train(composed("train", f"experiment={name}", *TINY, *toy, f"output={tmp_path}", "max_steps=2"))
    assert trainer.global_step == 2
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert "train/loss" in trainer.callback_metrics


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_say_how_they_are_run(name: str) -> None:
    head = [line for line in (CONF / "experiment" / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert head[0] == "# @package _global_"
    assert any(f"medclip train experiment={name}" in line for line in head)

"""Recipes against the numbers of their papers, as far as a config can be held to them."""

from __future__ import annotations

from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from medclip.config import CONF
from medclip.data.filters import Filter

# Pairs of BIOMEDICA by their first global concept, in millions (paper), and all of them.
PLOTS, ALL = 12.4, 24.07
LABELS = [
    "Plots and Charts",
    "Microscopy",
    "Clinical Imaging",
    "Tables",
    "Illustrative Diagrams",
    "Scientific Formulae",
]
METAS = [{"image_primary_label": [label]} for label in LABELS] + [
    {"image_primary_label": ["Plots and Charts", "Microscopy"]},
    {"image_primary_label": []},
    {},
]


def experiment(name: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"experiment={name}", "trainer.devices=4"])


def sources(cfg: DictConfig) -> list[dict[str, Any]]:
    return OmegaConf.to_container(cfg.data.sources, resolve=True)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["bmca_clip", "bmca_clip_filtered", "bmca_clip_balanced"])
def test_bmca_batch_and_optimiser(name: str) -> None:
    cfg = experiment(name)
    assert cfg.data.batch_size * cfg.trainer.devices == 8192 and cfg.trainer.accumulate_grad_batches == 1
    assert cfg.adapt.chunked.rows == 128  # what 80 GB hold in float32
    assert (cfg.optim.lr, list(cfg.optim.betas), cfg.optim.weight_decay) == (1e-6, [0.9, 0.95], 0.2)
    assert (cfg.trainer.precision, cfg.trainer.gradient_clip_val, cfg.task.schedule.warmup) == ("32-true", 1.0, 1000)
    assert (cfg.model.architecture, cfg.model.pretrained) == ("ViT-L-14", "commonpool_xl_s13b_b90k")
    assert {source["name"] for source in sources(cfg)} == set(cfg.callbacks.lineage.licences)


def test_bmca_forms_see_as_many_samples() -> None:
    full, filtered, balanced = (experiment(f"bmca_clip{form}") for form in ("", "_filtered", "_balanced"))
    assert full.epochs * 24 == filtered.epochs * 6 == balanced.epochs * 8 == 216
    # What the balanced form draws an epoch: its shares of plots and of all else.
    weights = {("not" in source["filter"]): source["weight"] for source in sources(balanced)}
    assert PLOTS * weights[False] + (ALL - PLOTS) * weights[True] == pytest.approx(8, abs=0.1)


def test_bmca_balanced_splits_every_sample_once() -> None:
    kept = [Filter(source["filter"]) for source in sources(experiment("bmca_clip_balanced"))]
    assert [sum(bool(rule(meta)) for rule in kept) for meta in METAS] == [3] * len(METAS)  # once a licence group
    assert [bool(kept[3](meta)) for meta in METAS] == [True, *[False] * 5, True, False, False]


def test_bmca_filtered_keeps_pictures_and_drawings() -> None:
    rules = {source["filter"] for source in sources(experiment("bmca_clip_filtered"))}
    assert len(rules) == 1
    rule = Filter(rules.pop())
    assert [bool(rule(meta)) for meta in METAS] == [False, True, True, False, True, False, True, False, False]


@pytest.mark.parametrize("name", ["vitamin_s", "vitamin_ltt", "mobileclip_s0", "encoder_protocol"])
def test_from_nothing_at_8192(name: str) -> None:
    cfg = experiment(name)
    assert cfg.data.batch_size * 8 * cfg.trainer.accumulate_grad_batches == 8192
    assert cfg.model.pretrained is None


def test_vitamins_recipe_is_the_protocols() -> None:
    one, other = experiment("vitamin_s"), experiment("encoder_protocol")
    for key in ("optim", "data.batch_size", "data.crop", "task.schedule", "trainer.precision", "epochs", "loss"):
        assert OmegaConf.select(one, key) == OmegaConf.select(other, key), key

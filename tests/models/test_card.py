"""The model card: front matter as Hugging Face's own parser reads it, and what is told of data, base and results."""

from __future__ import annotations

import copy
from typing import Any

from huggingface_hub import ModelCard

from medclip.models.card import About, card

RUN: dict[str, Any] = {
    "name": "tuned",
    "started": "2026-01-02",
    "parents": [{"role": "weights", "name": "ViT-B-16 x", "hub": "org/base", "licence": "mit", "lineage": None}],
    "sources": [
        {
            "name": "figures",
            "config": {"urls": "hf://datasets/org/figures/*.tar::more/*.tar", "filter": 'a == "b|c"'},
            "weight": 0.5,
            "samples": 12345,
            "left_out": {"missing caption": 2},
            "keys": "ab",
            "licence": None,
            "licences": {"CC BY": 12000, "CC BY-NC": 345},
        },
        {
            **{"name": "drawn", "config": {"phantoms": {"kind": "xray"}}, "weight": 1.0, "samples": 3, "left_out": {}},
            **{"keys": "cd", "licence": "CC0", "licences": None},
        },
    ],
    "keys": "f" * 64,
    "training": {
        **{"losses": ["contrastive"], "weights": {"contrastive": 0.5}, "adapt": ["lock_text"], "optimizer": ["AdamW"]},
        **{"lr": 1e-5, "weight_decay": 0.2, "batch": 4096, "batch_per_rank": 1024, "ranks": 4, "accumulated": 1},
        **{"steps": 100, "precision": "bf16-mixed", "seed": 7, "parameters": 2_000_000, "trainable": 500_000},
    },
    "code": [{"step": 0, "git_commit": "a" * 40, "git_changed": True, "packages": {"torch": "2.6"}}],
    "seen": {"steps": 99, "samples": 405504, "skipped": {"broken image": 4}},
}


def record(model: str, dataset: str, metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    task = "zeroshot_retrieval" if "retrieval" in dataset else "zeroshot_classification"
    own = {"dataset": dataset, "model": model, "pretrained": model, "task": task, "metrics": metrics, "samples": 50}
    return own | {"intervals": {k: [v - 0.1, v + 0.1] for k, v in metrics.items() if v is not None}} | more


RESULTS = [
    record("base", "colon", {"acc1": 0.5, "acc5": None, "brier": 0.4}),
    record(
        "tuned",
        "colon",
        {"acc1": 0.75, "acc5": None, "brier": 0.3},
        comparison={"base": "base", "differences": {"acc1": {"verdict": "gain"}}},
    ),
    record("base", "photos_retrieval", {"image_retrieval_recall@1": 0.6}, role="retention"),
    record(
        "tuned",
        "photos_retrieval",
        {"image_retrieval_recall@1": 0.4},
        role="retention",
        comparison={"base": "base", "differences": {"image_retrieval_recall@1": {"verdict": "loss"}}},
    ),
]


def written(**about: Any) -> str:
    words = {"model": "- images: 32", "use": "```python\n```", "library": "open_clip", "pipeline": "x-y"}
    words |= {"purpose": "reading toys", "scores": "cosines"}
    return card(About("My model", **about), **words)


def test_front_matter_is_hugging_faces() -> None:
    text = written(lineage=RUN, results=RESULTS, this="tuned", licence="cc-by-nc-4.0")
    data: Any = ModelCard(text).data
    assert (data.license, data.base_model, data.datasets) == ("cc-by-nc-4.0", ["org/base"], ["org/figures"])
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("open_clip", "x-y", "My model")
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {("colon", "acc1"): 0.75, ("photos_retrieval", "image_retrieval_recall@1"): 0.4}
    assert [r.task_type for r in data.eval_results] == ["zero-shot-image-classification", "image-text-retrieval"]


def test_results_have_intervals_and_verdicts() -> None:
    text = written(results=RESULTS, this="tuned")
    assert "| task | metric | base | **tuned** (this) | n |" in text
    assert "| colon | accuracy | 0.500 [0.400, 0.600] | 0.750 [0.650, 0.850] ▲ | 50 |" in text
    assert (
        "| photos_retrieval (retention) | text→image R@1 | 0.600 [0.500, 0.700] | 0.400 [0.300, 0.500] ▼ | 50 |" in text
    )
    assert "brier" not in text.split("---", 2)[2]


def test_data_and_settings() -> None:
    text = written(lineage=RUN)
    assert "405,504 samples seen in 99 steps. Not usable: 4 broken image." in text
    figures = next(line for line in text.splitlines() if line.startswith("| figures"))
    for part in ("12,345 | 0.5 | 2 missing caption | 12,000 CC BY, 345 CC BY-NC |", 'filter: a == "b\\|c"'):
        assert part in figures
    assert "| CC0 (as stated); not counted |" in text
    assert "(figures) is licensed for noncommercial use" in text
    assert "contrastive × 0.5" in text and "lock_text" in text and "0.5 of 2.0 million" in text
    assert "- weights: `ViT-B-16 x` ([org/base](https://huggingface.co/org/base)); licence: mit" in text
    assert f"{'a' * 12} with changes, torch 2.6" in text


def test_a_chain_tells_of_every_run() -> None:
    older = copy.deepcopy(RUN) | {"name": "older", "keys": "e" * 64}
    newer = RUN | {"parents": [{"role": "weights", "name": "older.ckpt", "lineage": older}]}
    text = written(lineage=newer)
    assert "Run `tuned`:" in text and "Run `older`:" in text and "e" * 64 in text
    assert "started from: weights of run `older`" in text
    # What the older run grew from is what all of it grew from.
    assert text.count("licence: mit") == 1 and "`older.ckpt` (" not in text


def test_a_blend_tells_of_both_ends() -> None:
    ends = {"base": {"name": "org/base", "hub": "org/base", "licence": None, "lineage": None}}
    ends |= {"checkpoint": {"name": "last.ckpt", "hub": None, "licence": None, "lineage": RUN}}
    text = written(lineage={"blend": {"alpha": 0.5, **ends}})
    assert "from `org/base` (0) to run `tuned` (1), at 0.5" in text
    assert text.count("Run `tuned`:") == 1
    assert ModelCard(text).data.to_dict()["base_model"] == ["org/base"]


def test_what_is_not_known_is_said() -> None:
    text = written()
    assert "Not known: the checkpoint says nothing" in text and "no licence was stated" in text
    assert "medical images: reading toys. Not a medical device" in text
    assert "license" not in ModelCard(text).data.to_dict()

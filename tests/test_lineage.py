"""What a run was trained on, from config to exported folder: counted by hand, kept over a chain and a resume."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from medclip.callbacks.lineage import keys_digest, shareable
from medclip.config import CONF, build
from medclip.evaluate import evaluate
from medclip.export import export
from medclip.models.lineage import describe, parents, read_lineage
from medclip.train import train
from medclip.types import UserError

TOY = [
    *("experiment=tiny", "model=tiny_vit", "model.architecture.vision_cfg.layers=1", "data.workers=0"),
    *("model.architecture.text_cfg.layers=1", "data.batch_size=8", "trainer.accelerator=cpu"),
]


def composed(verb: str, *words: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(verb, list(words))


def hand_digest(keys: list[str]) -> str:
    return f"{sum(int(hashlib.sha256(key.encode()).hexdigest(), 16) for key in keys) % 2**256:064x}"


def test_digest_knows_no_order_but_every_key() -> None:
    keys = ["a", "β-1", "fig.2"]
    assert keys_digest(keys) == keys_digest(keys[::-1]) == hand_digest(keys)
    assert keys_digest([]) == "0" * 64
    assert len({keys_digest(some) for some in ([], ["a"], ["a", "a"], ["a", "b"], ["b"])}) == 5
    parts = int(keys_digest(keys[:1]), 16) + int(keys_digest(keys[1:]), 16)
    assert f"{parts % 2**256:064x}" == keys_digest(keys)


@pytest.mark.parametrize(
    "value, shown",
    [
        ("/data/private/pairs.csv", "…/pairs.csv"),
        ("~/pairs.csv", "…/pairs.csv"),
        ("../up/pairs.csv", "…/pairs.csv"),
        ("shards/{0..9}.tar", "shards/{0..9}.tar"),
        ("local-dir:/models/a", "…/a"),
        ("file:///data/x.tar", "…/x.tar"),
        ("/a/1.tar::b/2.tar", "…/1.tar::b/2.tar"),
        ("https://me:word@host/x.tar?sig=secret", "https://***@host/x.tar"),
        ("hf://datasets/org/name/*.tar", "hf://datasets/org/name/*.tar"),
        ({"hf_token": "abc", "n": [1, "/x/y"]}, {"hf_token": "***", "n": [1, "…/y"]}),
    ],
)
def test_what_may_be_told(value: Any, shown: Any) -> None:
    assert shareable(value) == shown


class CopyAtFour(pl.Callback):
    """Keeps the checkpoint of step 3, which a kill in step 4 would leave."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3 and trainer.checkpoint_callback:
            last = Path(trainer.checkpoint_callback.dirpath) / "last.ckpt"  # type: ignore[attr-defined]
            if last.is_file():  # the resumed run has not written one yet
                shutil.copy(last, last.with_name("middle.ckpt"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """21 rows of three licences and one image that is no image."""
    folder = tmp_path_factory.mktemp("table")
    with tarfile.open(shards / "00002.tar") as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(".jpg"))
        (folder / "a.jpg").write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    (folder / "broken.jpg").write_bytes(b"no image")
    licences = ["CC BY"] * 12 + ["CC BY-NC"] * 7 + [None] * 2
    rows = [{"id": f"k{i}", "image": "a.jpg", "caption": "left lung", "license": x} for i, x in enumerate(licences)]
    rows[3]["image"] = "broken.jpg"
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, table: Path, shards: Path) -> Path:
    """`base` on shards, and `tuned` on the table and a part of the shards, and that from its third step again."""
    folder = tmp_path_factory.mktemp("runs")
    base = [
        *TOY,
        f"output={folder / 'base'}",
        "max_steps=2",
        f"data.sources=[{{urls: '{shards}/*.tar', name: figures}}]",
    ]
    train(composed("train", *base))
    mixed = f"[{{table: {table}}}, {{urls: '{shards}/00002.tar', name: figures, weight: 0.5}}]"
    tuned = [word for word in TOY if "architecture" not in word and not word.startswith("model")]
    tuned += ["model=local", f"model.pretrained={folder / 'base/checkpoints/last.ckpt'}", f"data.sources={mixed}"]
    tuned += [
        f"output={folder / 'tuned'}",
        "data.max_bad_fraction=0.5",
        "epochs=3",
        "+callbacks.lineage.licences.figures=CC0",
    ]
    tuned += ["max_steps=6", "callbacks.checkpoint.every_n_steps=3", f"+callbacks.copy._target_={__name__}.CopyAtFour"]
    train(composed("train", *tuned))
    middle = folder / "tuned" / "checkpoints" / "middle.ckpt"
    # Another folder, as after a move: what the run is stays what it was.
    again = [f"output={folder / 'again'}" if word.startswith("output=") else word for word in tuned]
    train(composed("train", *again, f"resume={middle}"))
    return folder


def lineage(run: Path) -> dict[str, Any]:
    found = read_lineage(str(run / "checkpoints" / "last.ckpt"))
    assert found is not None
    return found


def test_a_run_tells_what_it_saw(runs: Path, table: Path, shards: Path) -> None:
    found = lineage(runs / "tuned")
    assert found == json.loads((runs / "tuned" / "lineage.json").read_text())
    first, second = found["sources"]
    assert (first["samples"], first["licences"]) == (21, {"CC BY": 12, "CC BY-NC": 7, "not stated": 2})
    assert first["keys"] == hand_digest([f"k{i}" for i in range(21)])
    assert (second["samples"], second["licence"], second["licences"]) == (20, "CC0", None)
    total = (int(first["keys"], 16) + int(second["keys"], 16)) % 2**256
    assert int(found["keys"], 16) == total
    # 21 + 20 / 2 = 31 an epoch in batches of 8: 8, 8, 8, 7 and 8, 8.
    assert found["samples_per_epoch"] == 31
    assert (found["seen"]["steps"], found["seen"]["samples"]) == (6, 47)
    assert sum(found["seen"]["skipped"].values()) == 1
    how = found["training"]
    assert (how["batch"], how["optimizer"], how["lr"], how["adapt"]) == (8, ["AdamW"], 1e-3, [])
    assert str(table.parent) not in json.dumps(found) and str(runs) not in json.dumps(found)


def test_a_resumed_run_is_the_uninterrupted_one(runs: Path) -> None:
    middle = read_lineage(str(runs / "tuned" / "checkpoints" / "middle.ckpt"))
    assert middle is not None and (middle["seen"]["steps"], middle["seen"]["samples"]) == (3, 24)
    again, whole = lineage(runs / "again"), lineage(runs / "tuned")
    again["seen"].pop("skipped"), whole["seen"].pop("skipped")  # the list of them stayed in the first folder
    assert again == whole


def test_a_chain_keeps_its_parents(runs: Path) -> None:
    (parent,) = lineage(runs / "tuned")["parents"]
    assert parent["lineage"] == lineage(runs / "base")
    assert (parent["role"], parent["name"], parent["hub"]) == ("weights", "…/last.ckpt", None)
    assert lineage(runs / "base")["parents"] == []


def test_metadata_of_shards_is_read_where_asked(tmp_path: Path, shards: Path) -> None:
    words = [*TOY, f"output={tmp_path}", "max_steps=1", "callbacks.lineage.count_licences=true"]
    train(composed("train", *words, f"data.sources=[{{urls: '{shards}/00003.tar'}}]"))
    assert lineage(tmp_path)["sources"][0]["licences"] == {"not stated": 3}


def test_exports_keep_it_and_a_new_run_reads_it_back(runs: Path, shards: Path, tmp_path: Path) -> None:
    tuned, base = (str(runs / name / "checkpoints" / "last.ckpt") for name in ("tuned", "base"))
    results = tmp_path / "evaluation"
    data = f"evals.retrieval.data.sources=[{{urls: '{shards}/00002.tar'}}]"
    evaluate(
        composed(
            "evaluate",
            *(f"output={results}", f"checkpoints.base={base}", f"checkpoints.adapted={tuned}", "eval=[retrieval]"),
            *(data, "workers=0", "device=cpu", "bootstrap.samples=100"),
        )
    )
    words = [f"checkpoint={tuned}", f"results={results / 'results.json'}", "license=cc-by-nc-4.0"]
    (folder,) = export(composed("export", *words, f"output={tmp_path / 'model'}"))
    assert read_lineage(str(folder)) == lineage(runs / "tuned")
    text = (folder / "README.md").read_text()
    assert "**adapted** (this)" in text and "12 CC BY, 7 CC BY-NC" in text and "Run `base`" in text
    assert str(tmp_path) not in text and str(runs) not in text
    assert describe(None, str(folder))["licence"] == "cc-by-nc-4.0"

    (blend,) = export(
        composed("export", f"checkpoint={tuned}", f"base={base}", "alpha=0.5", f"output={tmp_path / 'b'}")
    )
    ends = json.loads((blend / "lineage.json").read_text())["blend"]
    assert ends["alpha"] == 0.5 and ends["base"]["lineage"] == lineage(runs / "base")
    with pytest.raises(UserError, match="say which of them this is with results_model="):
        export(composed("export", *words, f"base={base}", "alpha=0.5", f"output={tmp_path / 'c'}"))
    with pytest.raises(UserError, match="results_model=x is not in"):
        export(composed("export", *words, "results_model=x", f"output={tmp_path / 'c'}"))


def test_names_of_what_a_run_starts_from(tmp_path: Path) -> None:
    found = parents(
        [
            {"role": "weights", "architecture": "ViT-B-16", "pretrained": "laion2b_s34b_b88k"},
            {"role": "weights", "architecture": None, "pretrained": "hf-hub:org/name"},
            {"role": "image tower", "pretrained": {"architecture": "ViT-B-32", "pretrained": "openai"}},
            {"role": "image tower", "pretrained": None},
            None,
        ]
    )
    assert [(p["role"], p["name"], p["hub"]) for p in found] == [
        ("weights", "ViT-B-16 laion2b_s34b_b88k", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
        ("weights", "hf-hub:org/name", "org/name"),
        ("image tower", "ViT-B-32 openai", "timm/vit_base_patch32_clip_224.openai"),
    ]
    (tmp_path / "lineage.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        read_lineage(str(tmp_path))


def test_what_a_model_of_questions_starts_from(tmp_path: Path) -> None:
    source = "data.sources=[{phantoms: {kind: questions, samples: 8, size: 64, seed: 0}}]"

    def starts(*words: str) -> list[tuple[str, str]]:
        cfg = composed("train", source, *words).callbacks.lineage.parents
        return [(found["role"], found["name"]) for found in build(cfg)]

    parts = [f"model.visual.parts.{i}.pretrained={name}" for i, name in enumerate(("a.ckpt", "ae.pth"))]
    both = [("image tower", "a.ckpt"), ("auto-encoder", "ae.pth")]
    assert starts("experiment=medvqa_mevf", *parts) == both
    assert starts("experiment=medvqa_qcr", *parts) == both  # types that are trained beside it come from nowhere
    types = starts("experiment=medvqa_qcr", *parts, "model.types=types.ckpt")
    assert types == [*both, ("types of questions", "types.ckpt")]
    clip = [f"model.{part}.pretrained=c.ckpt" for part in ("visual", "questions.clip")]
    clip.append("model.questions.clip.architecture=null")
    assert starts("experiment=medvqa_xattn", *clip) == [("image tower", "c.ckpt"), ("text tower", "c.ckpt")]
    language = ["model.visual.pretrained=c.ckpt", f"model.language.folder={tmp_path}"]
    words = [("image tower", "c.ckpt"), ("language model", str(tmp_path))]
    assert starts("experiment=medvqa_generate", *language) == words

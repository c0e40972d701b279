"""What W&B gets of a training, read back from the files of an offline run that was stopped once and resumed."""

from __future__ import annotations

import json
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from medclip.callbacks.artifacts import checkpoint_artifact
from medclip.callbacks.throughput import Throughput
from medclip.callbacks.wandb_log import last_step, records
from medclip.config import CONF
from medclip.data.sources import open_sources
from medclip.evaluate import evaluate
from medclip.train import train
from medclip.types import UserError

wandb = pytest.importorskip("wandb")

TRAIN = {"kind": "xray", "samples": 32, "size": 64, "seed": 0}
TEST = {"kind": "xray", "samples": 24, "size": 64, "seed": 9}


def phantoms(recipe: dict[str, Any]) -> str:
    return f"[{{phantoms: {{{', '.join(f'{k}: {v}' for k, v in recipe.items())}}}}}]"


WORDS = [
    "experiment=tiny",
    "model=tiny_vit",
    "model.architecture.vision_cfg.image_size=32",
    "model.architecture.vision_cfg.layers=1",
    "model.architecture.vision_cfg.width=64",
    "model.architecture.text_cfg.layers=1",
    "model.architecture.text_cfg.width=32",
    "model.architecture.text_cfg.context_length=16",
    "callbacks=[default,online,best_online,tracking]",
    "callbacks.checkpoint.every_n_steps=2",
    "callbacks.online.every_n_steps=3",
    "logger=[csv,wandb]",
    "trainer.gradient_clip_val=null",
    "loss=[clip,siglip]",
    "data.batch_size=8",
    "data.workers=0",
    f"data.sources={phantoms(TRAIN)}",
    "eval=[phantom_xray,phantom_xray_retrieval]",
    f"evals.phantom_xray.data.sources={phantoms(TEST)}",
    f"evals.phantom_xray_retrieval.data.sources={phantoms(TEST)}",
    "epochs=2",
]
NUMBERS = {
    *("train/loss", "train/contrastive", "train/sigmoid", "train/logit_scale", "train/grad_norm"),
    *("optim/lr", "memory/rss_peak_gib", "speed/samples_per_second", "speed/data_wait", "data/skipped"),
    *("eval/score", "eval/phantom_xray/acc1", "eval/phantom_xray/mean_per_class_recall"),
    *("eval/phantom_xray/auroc", "eval/phantom_xray/macro_f1"),
    *(f"eval/phantom_xray_retrieval/{side}_retrieval_recall@{k}" for side in ("text", "image") for k in (1, 5, 10)),
}
TABLES = {
    *(f"media/phantom_xray/{panel}" for panel in ("classes", "confusion_table", "examples", "prompts")),
    *(f"media/phantom_xray_retrieval/{panel}" for panel in ("images_to_texts", "texts_to_images")),
}


class Stopped(Exception):
    """In place of what stops a run and lets it end its log."""


def leg(cfg: Any) -> None:
    """One training, to the end of its log: W&B's own process writes it, and is waited for as at a program's end."""
    try:
        train(cfg)
    finally:
        wandb.teardown()


def compose_train(folder: Path, *words: str) -> Any:
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*WORDS, f"output={folder}", *words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is stopped in its seventh step, whose last checkpoint is of the sixth, and gone on with."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    start = Throughput.on_train_batch_start

    def stop(self: Any, trainer: pl.Trainer, *args: Any) -> None:
        start(self, trainer, *args)
        if trainer.global_step == 5:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(folder.parent / "data"))
        patch.setattr(Throughput, "on_train_batch_start", stop)
        with pytest.raises(Stopped):
            leg(compose_train(folder))
        patch.setattr(Throughput, "on_train_batch_start", start)
        leg(compose_train(folder, "resume=auto"))
    return folder


class Log:
    """All legs of a run's log, in the order of their time."""

    def __init__(self, folder: Path) -> None:
        self.legs = [list(records(path)) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
        self.artifacts = [r.artifact for leg in self.legs for r in leg if r.WhichOneof("record_type") == "artifact"]
        self.rows: list[dict[str, Any]] = []
        for leg in self.legs:
            for record in leg:
                if record.WhichOneof("record_type") == "history":
                    row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                    self.rows.append(row | {"step": record.history.step.num})

    def files(self, artifact: Any) -> dict[str, Path]:
        return {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}

    def tables(self, name: str) -> list[tuple[dict[str, Any], dict[str, Path]]]:
        """Every version of a table, with the files that it shows."""
        path = f"{name}.table.json"
        kept = [files for artifact in self.artifacts if path in (files := self.files(artifact))]
        return [(json.loads(files[path].read_text()), files) for files in kept]


@pytest.fixture(scope="module")
def log(folder: Path) -> Log:
    return Log(folder)


def test_one_run_and_each_step_once(folder: Path, log: Log) -> None:
    assert len(log.legs) == 2
    ids = {r.run.run_id for leg in log.legs for r in leg if r.WhichOneof("record_type") == "run"}
    assert ids == {(folder / "wandb_id").read_text()}
    assert [row["step"] for row in log.rows] == list(range(8))
    assert all(row["trainer/global_step"] == row["step"] for row in log.rows)
    assert last_step(folder, ids.pop()) == 7


def test_the_numbers_are_those_of_the_csv(folder: Path, log: Log) -> None:
    head, *lines = (folder / "metrics.csv").read_text().splitlines()
    expected: dict[int, dict[str, float]] = defaultdict(dict)
    for line in lines:
        row = {k: float(v) for k, v in zip(head.split(","), line.split(","), strict=True) if v}
        expected[int(row.pop("step"))] |= row
    found = {key for row in log.rows for key in row}
    assert not NUMBERS - found
    for row in log.rows:
        step = expected[row["step"]]
        # What a clock or the process says differs between the run that was stopped and the one that went on.
        same = [k for k in step if not k.startswith(("speed/", "memory/"))]
        assert {k: row[k] for k in same} == pytest.approx({k: step[k] for k in same}, rel=1e-6)
    assert sum("eval/score" in row for row in log.rows) == 4


def test_learning_rate_and_gradient_are_those_of_the_step(log: Log) -> None:
    """Warm-up of one step in eight (5 %, rounded up), then half a cosine from 1e-3; clipping is off."""
    rates = [row["optim/lr"] for row in log.rows]
    assert max(rates) == pytest.approx(1e-3) and rates[-1] < rates[-2] < 1e-3
    assert all(row["train/grad_norm"] > 0 for row in log.rows)
    for row in log.rows:
        assert row["train/loss"] == pytest.approx(row["train/contrastive"] + row["train/sigmoid"], rel=1e-6)


def test_tables_tell_the_evaluation(log: Log) -> None:
    shown = {key.removesuffix("/_type") for row in log.rows for key, value in row.items() if value == "table-file"}
    assert shown == TABLES
    last = log.rows[-1]
    classes, _ = log.tables("media/phantom_xray/classes")[-1]
    rows = [dict(zip(classes["columns"], row, strict=True)) for row in classes["data"]]
    assert len(rows) == 6 and sum(row["samples"] for row in rows) == TEST["samples"]
    recalls = [row["recall"] for row in rows if row["samples"]]
    assert np.mean(recalls) == pytest.approx(last["eval/phantom_xray/mean_per_class_recall"])
    confusion, _ = log.tables("media/phantom_xray/confusion_table")[-1]
    right = sum(count for truth, guess, count in confusion["data"] if truth == guess)
    assert sum(row[2] for row in confusion["data"]) == TEST["samples"]
    assert right / TEST["samples"] == pytest.approx(last["eval/phantom_xray/acc1"])
    config = [r.config for leg in log.legs for r in leg if r.WhichOneof("record_type") == "config"]
    charts = {"/".join(update.nested_key): update.value_json for c in config for update in c.update}
    assert "wandb/confusion_matrix/v1" in charts["_wandb/visualize/media/phantom_xray/confusion"]


def pictures(table: dict[str, Any], files: dict[str, Path]) -> list[list[Image.Image]]:
    cells = [[c for c in row if isinstance(c, dict) and c.get("_type") == "image-file"] for row in table["data"]]
    return [[Image.open(BytesIO(files[cell["path"]].read_bytes())) for cell in row] for row in cells]


def test_galleries_show_pictures_but_no_captions(log: Log) -> None:
    for name, columns, each in (
        ("images_to_texts", ["image", "rank of the own", *(f"hit {i}" for i in range(1, 6))], 1),
        ("texts_to_images", ["caption", "rank of the own", *(f"hit {i}" for i in range(1, 6))], 5),
    ):
        table, files = log.tables(f"media/phantom_xray_retrieval/{name}")[-1]
        assert table["columns"] == columns and len(table["data"]) == 6
        for row in pictures(table, files):
            assert len(row) == each and all(image.size == (32, 32) and np.asarray(image).std() > 5 for image in row)
    hits, _ = log.tables("media/phantom_xray_retrieval/images_to_texts")[-1]
    for row in hits["data"]:
        own = [place for place, cell in enumerate(row[2:], 1) if cell.startswith("✓")]
        assert (own[0] == row[1]) if own else row[1] > 5
        assert all(len(cell.split()) == 2 for cell in row[2:])  # a mark and a cosine
    examples, files = log.tables("media/phantom_xray/examples")[-1]
    assert len(pictures(examples, files)) == 12


def test_the_first_images_are_those_that_the_model_saw(folder: Path, log: Log) -> None:
    row = log.rows[0]
    assert row["media/train/count"] == 8 and row["media/train/captions"] == [f"row {i}" for i in range(8)]
    first = sorted(folder.glob("wandb/offline-run-*"))[0]
    seen = [np.asarray(Image.open(first / "files" / name)) for name in row["media/train/filenames"]]
    assert all(image.shape == (32, 32, 3) for image in seen)
    cfg = compose_train(folder.parent / "again", "logger=none", "max_steps=1")
    cfg.callbacks, cfg.evals = {}, {}

    class Keep(pl.Callback):
        image: torch.Tensor

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            Keep.image = batch["image"].clone()

    with pytest.MonkeyPatch.context() as patch:
        fit = pl.Trainer.fit
        patch.setattr(pl.Trainer, "fit", lambda self, *a, **k: (self.callbacks.append(Keep()), fit(self, *a, **k))[1])
        train(cfg)
    assert np.array_equal(np.stack(seen), Keep.image.permute(0, 2, 3, 1).numpy())


def inputs(log: Log) -> dict[str, Any]:
    return {a.name: a for a in log.artifacts if a.use_after_commit}


def outputs(log: Log) -> list[Any]:
    return [a for a in log.artifacts if a.type == "model" and not a.use_after_commit]


def test_lineage_from_data_to_run_to_run(folder: Path, log: Log, tmp_path: Path) -> None:
    """The data set by its keys; two checkpoints; and the next run uses what this one has logged, and says which."""
    (name,) = [name for name in inputs(log) if name.startswith("data-")]
    artifact = inputs(log)[name]
    about = json.loads(log.files(artifact)["sources.json"].read_text())
    assert artifact.type == "dataset" and list(log.files(artifact)) == ["sources.json"]
    assert about["sources"][0]["samples"] == TRAIN["samples"] and name == f"data-{about['keys'][:12]}"
    assert about["sources"][0]["config"]["phantoms"] == TRAIN

    made = {alias: a for a in outputs(log) for alias in a.aliases}
    assert set(made) == {"latest", "best", "last"}
    assert {a.name for a in made.values()} == {f"checkpoint-{(folder / 'wandb_id').read_text()}"}
    last = json.loads(made["last"].metadata)
    assert last["step"] == 8 and last["bytes"] == (folder / "checkpoints" / "last.ckpt").stat().st_size
    assert list(log.files(made["last"])) == ["checkpoint.json"]  # not the weights

    words = [
        "model=local",
        f"model.pretrained={folder}/checkpoints/last.ckpt",
        "callbacks=[default,tracking]",
        "max_steps=1",
        "loss=[clip]",
    ]
    plain = [w for w in WORDS if not w.startswith(("model", "callbacks", "eval", "loss", "data.sources"))]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*plain, *words, f"data.sources={phantoms(TRAIN)}", f"output={tmp_path / 'next'}"])
    leg(cfg)
    after = inputs(Log(tmp_path / "next"))
    assert after[made["last"].name].digest == made["last"].digest  # the same version of the same artifact
    assert after[name].digest == artifact.digest  # the same data

    evals = [w for w in WORDS if w.startswith("eval")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [*evals, f"checkpoint={folder}/checkpoints/best.ckpt", f"output={tmp_path / 'report'}", "workers=0"]
        evaluate(compose("evaluate", [*words, "logger=[wandb]", "bootstrap.samples=100", "device=cpu"]))
    wandb.teardown()
    report = Log(tmp_path / "report")
    assert inputs(report)[made["best"].name].digest == made["best"].digest
    table, _ = report.tables("results")[0]
    found = {(row[0], row[2]): row[3:] for row in table["data"]}
    value, low, high = found["phantom_xray", "auroc"]
    assert low <= value <= high


def test_nothing_that_names_a_sample_goes_out(folder: Path, log: Log) -> None:
    """No key, patient or caption of either set, in any file or record; and captions where they are asked for."""
    told = b"".join(path.read_bytes() for path in folder.glob("wandb/offline-run-*/*.wandb"))
    for artifact in log.artifacts:
        for path in log.files(artifact).values():
            told += path.read_bytes()
    told += b"".join(path.read_bytes() for path in folder.glob("wandb/offline-run-*/files/**/*.json"))
    for config in (TRAIN, TEST):
        (source,) = open_sources([{"phantoms": config}])
        for i in range(len(source)):
            fields = source.fields(i)
            for word in (source.key(i), fields["phantom"]["patient"], *fields["phantom"]["captions"]):
                assert str(word).encode() not in told, word


def test_weights_go_out_only_where_asked_for(folder: Path) -> None:
    path = folder / "checkpoints" / "last.ckpt"
    artifact = checkpoint_artifact(str(path), upload=True)
    assert set(artifact.manifest.entries) == {"checkpoint.json", "last.ckpt"}
    assert artifact.manifest.entries["last.ckpt"].size == path.stat().st_size


def test_a_log_that_was_cut_short_is_read_as_far_as_it_goes(folder: Path, log: Log, tmp_path: Path) -> None:
    """Whatever is cut off, the last whole step counts, and no later one."""
    whole = sorted(folder.glob("wandb/offline-run-*/*.wandb"))[0]
    content, run_id = whole.read_bytes(), (folder / "wandb_id").read_text()
    path = tmp_path / "wandb" / f"offline-run-1-{run_id}" / whole.name
    path.parent.mkdir(parents=True)
    steps = []
    for end in np.linspace(0, len(content), 40).astype(int):
        path.write_bytes(content[:end])
        steps.append(last_step(tmp_path, run_id))
    assert steps == sorted(steps) and steps[0] == -1 and steps[-1] == 4 and len(set(steps)) > 3


def test_captions_where_asked_for(tmp_path: Path) -> None:
    words = ["callbacks.media.captions=true", "max_steps=1", "callbacks.online.at_start=false"]
    leg(compose_train(tmp_path / "run", *words))
    log = Log(tmp_path / "run")
    (source,) = open_sources([{"phantoms": TEST}])
    known = {caption for i in range(len(source)) for caption in source.fields(i)["phantom"]["captions"]}
    table, _ = log.tables("media/phantom_xray_retrieval/texts_to_images")[0]
    assert {row[0] for row in table["data"]} <= known
    (source,) = open_sources([{"phantoms": TRAIN}])
    text = " ".join(source.read(i).text.lower() for i in range(len(source)))  # pyright: ignore
    for caption in log.rows[0]["media/train/captions"]:
        assert all(word in text for word in caption.replace("<", " ").split()) and len(caption) > 10


def test_tracking_without_wandb_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"say logger=\[csv,wandb\]"):
        train(compose_train(tmp_path / "run", "logger=[csv]", "callbacks.online.at_start=false"))

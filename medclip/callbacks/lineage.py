"""What a run was trained on, and what it grew from: `lineage.json` in the run folder, `lineage` in every checkpoint.

    {"name", "started", "task", "model", "parents": [{role, name, hub, licence, lineage}],
     "sources": [{name, config, weight, samples, left_out, keys, licences}], "keys",
     "training": {losses, weights, adapt, optimizer, lr, batch, …}, "code": [{step, git_commit, …}],
     "seen": {steps, samples, skipped}}

`keys` is a digest of the samples' keys that does not depend on their order: the sum of the SHA-256 of each key, modulo
2**256 (Bellare and Micciancio, EUROCRYPT 1997: AdHash), so that two runs on the same samples, or one over two sources
and one over both as one, can be told to have had the same. It is no secret: who has the data can recompute it.

Licences are counted where all metadata is at hand (tables); for shards that would read the metadata of every sample,
which `count_licences: true` does. What a source as a whole is licensed under may be said: `licences: {name: "CC BY"}`.

Secrets, and the folders of this machine, are left out. A resumed run keeps the lineage of its start.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from medclip.callbacks.provenance import revision, versions, without_secrets, write_whole

LICENCES = ("license", "licence", "article_license", "License", "Licence", "image_license", "license_name")


class Lineage(pl.Callback):
    """Writes `lineage.json` to `output`, the run folder, and adds it to each checkpoint.

    Args:
        output: the run folder.
        parents: what the weights come from, see `medclip.models.lineage.parents`.
        adapt: names of what was done to the model before training.
        licences: name of a source -> what it is licensed under as a whole.
        count_licences: read every sample's metadata for its licence; null: where it is in memory anyway.
    """

    def __init__(
        self,
        output: str,
        parents: Sequence[Mapping[str, Any]] = (),
        adapt: Sequence[str] = (),
        licences: Mapping[str, str] | None = None,
        count_licences: bool | None = None,
    ) -> None:
        self.output = Path(output)
        self.parents = [dict(parent) for parent in parents]
        self.adapt = list(adapt)
        self.licences = dict(licences or {})
        self.count_licences = count_licences
        self.lineage: dict[str, Any] | None = None
        self.seen = (0, 0)  # epoch, samples of it that all ranks have consumed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        code = {"step": trainer.global_step, **revision(Path(__file__).parent), **versions()}
        if self.lineage is None:
            self.lineage = self._start(trainer, pl_module)
        if not self.lineage["code"] or not _same(self.lineage["code"][-1], code):
            self.lineage["code"].append(code)
        self._write(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen = (int(batch["epoch"]), int(batch["position"])) if "position" in batch else self.seen

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.lineage is not None and trainer.is_global_zero:
            self._write(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.lineage is not None:
            checkpoint["lineage"] = self._now(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if isinstance(found := checkpoint.get("lineage"), Mapping):
            self.lineage = dict(found)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        epoch, position = state_dict["seen"]
        self.seen = (epoch, position)

    def _write(self, trainer: pl.Trainer) -> None:
        text = json.dumps(self._now(trainer), indent=1, ensure_ascii=False)
        write_whole(self.output / "lineage.json", text)

    def _now(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The lineage with what was seen by now."""
        assert self.lineage is not None
        epoch, position = self.seen
        samples = epoch * self.lineage["samples_per_epoch"] + position
        skipped = dict(Counter(row["reason"] for row in _rows(self.output / "skipped.jsonl")))
        return self.lineage | {"seen": {"steps": trainer.global_step, "samples": samples, "skipped": skipped}}

    def _start(self, trainer: pl.Trainer, task: pl.LightningModule) -> dict[str, Any]:
        data: Any = getattr(trainer, "datamodule", None)
        sources = list(getattr(data, "sources", []))
        configs = [*getattr(data, "configs", []), *[{}] * len(sources)]
        rows = [self._source(source, config) for source, config in zip(sources, configs, strict=False)]
        total = sum(int(row["keys"], 16) for row in rows) % _MODULUS
        return {
            "name": self.output.name,
            "started": datetime.now(UTC).date().isoformat(),
            "task": type(task).__name__,
            "model": _model(getattr(task.model, "description", None)),
            "parents": [shareable(parent) for parent in self.parents],
            "sources": rows,
            "keys": f"{total:064x}",
            "samples_per_epoch": int(data.state_dict().get("samples", 0)) if data is not None else 0,
            "training": self._training(trainer, task, data),
            "code": [],
        }

    def _source(self, source: Any, config: Mapping[str, Any]) -> dict[str, Any]:
        reasons = Counter(reason for _, reason, _ in source.problems)
        return {
            "name": shareable(str(source.name)),
            "config": shareable({k: v for k, v in config.items() if v is not None}),
            "weight": float(source.weight),
            "samples": len(source),
            "left_out": dict(reasons),
            "keys": keys_digest(source.key(i) for i in range(len(source))),
            "licence": self.licences.get(str(source.name)),
            "licences": self._count(source),
        }

    def _count(self, source: Any) -> dict[str, int] | None:
        """How many samples have which licence; None: not counted."""
        wanted = self.count_licences
        if wanted is False or (wanted is None and not hasattr(source, "table")):
            return None
        counts: Counter[str] = Counter()
        for i in range(len(source)):
            with suppress(Exception):  # a broken sample is the stream's to report
                fields = source.fields(i)
                counts[next((str(fields[name]) for name in LICENCES if fields.get(name)), "not stated")] += 1
        return dict(counts.most_common())

    def _training(self, trainer: pl.Trainer, task: Any, data: Any) -> dict[str, Any]:
        optimizers = trainer.optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = sorted({float(group.get("initial_lr", group["lr"])) for group in groups})
        batch = getattr(data, "batch_size", None)
        accumulated = trainer.accumulate_grad_batches
        parameters = list(task.parameters())
        return {
            "losses": sorted(getattr(task, "losses", {})),
            "weights": dict(getattr(task, "weights", {})),
            "adapt": self.adapt,
            "optimizer": sorted({type(optimizer).__name__ for optimizer in optimizers}),
            "lr": rates[-1] if rates else None,
            "lr_least": rates[0] if rates else None,
            "weight_decay": max((float(group.get("weight_decay", 0)) for group in groups), default=0.0),
            "betas": list(groups[0].get("betas", [])) if groups else [],
            "batch": None if batch is None else batch * trainer.world_size * accumulated,
            "batch_per_rank": batch,
            "ranks": trainer.world_size,
            "accumulated": accumulated,
            "steps": int(trainer.estimated_stepping_batches),
            "epochs": getattr(data, "epochs", None),
            "precision": str(trainer.precision),
            "clip": trainer.gradient_clip_val,
            "seed": getattr(task, "seed", None),
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        }


_MODULUS = 1 << 256


def keys_digest(keys: Iterable[str]) -> str:
    """Sum of the keys' SHA-256 modulo 2**256, as 64 hexadecimal digits; of no key it is 0."""
    total = 0
    for key in keys:
        total += int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest(), "big")
    return f"{total % _MODULUS:064x}"


def shareable(value: Any) -> Any:
    """Plain data without secrets, queries of URLs and folders of this machine: of an absolute path its last name."""
    value = without_secrets(value)
    if isinstance(value, Mapping):
        return {str(k): shareable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(v) for v in value]
    return _public(value) if isinstance(value, str) else value


def _public(text: str) -> str:
    if "::" in text:
        return "::".join(_public(part) for part in text.split("::"))
    scheme, sep, rest = text.partition("://")
    if sep and scheme != "file":
        return f"{scheme}://{rest.partition('?')[0]}"
    path = Path((rest if sep else text).removeprefix("local-dir:"))
    if path.is_absolute() or text.startswith("~") or ".." in path.parts:
        return f"…/{path.name}"
    return text


def _model(description: Any) -> dict[str, Any]:
    """Of a model's description what is short: not the files of its tokenizer."""
    if not isinstance(description, Mapping):
        return {}
    return shareable({key: value for key, value in description.items() if key != "files"})


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return {k: v for k, v in one.items() if k != "step"} == {k: v for k, v in other.items() if k != "step"}


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            with suppress(ValueError):  # a line that a killed run left unfinished
                row = json.loads(line)
                if isinstance(row, dict) and "reason" in row:
                    yield row

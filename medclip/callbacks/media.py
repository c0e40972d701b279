"""What the evaluations of a training look like, in W&B: tables by class, confusion, galleries, and its first images.

Names are `media/EVALUATION/…`, and `media/train` for the images that the first step sees, as the model sees them. Keys,
groups and metadata of samples stay here; captions too unless they are asked for. Images and class names do go out:
leave the callback out where they must not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

from medclip.types import UserError


class Media(pl.Callback):
    """Shows the results of each evaluation of `OnlineEvaluation`.

    Args:
        captions: show captions of the data, and what the tokenizer leaves of them in the first training batch.
        images: images of the first training batch; 0 for none.
    """

    def __init__(self, captions: bool = False, images: int = 8) -> None:
        self.captions = captions
        self.images = images
        self._shown = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_wandb(trainer, "callbacks.media")
        self._shown = trainer.global_step > 0  # by the run's first leg

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._shown or not self.images:
            return
        self._shown = True
        rows = min(self.images, len(batch["key"]))
        pictures = [Image.fromarray(row) for row in pixels(batch, rows, pl_module.model.preprocess)]  # pyright: ignore
        texts = captions(batch, rows, pl_module.model) if self.captions else [f"row {row}" for row in range(rows)]
        for logger in wandb_loggers(trainer):
            logger.log_image("media/train", pictures, caption=texts)

    def evaluated(
        self,
        trainer: pl.Trainer,
        task: pl.LightningModule,
        metrics: Mapping[str, float],
        results: Mapping[str, Any],
        *,
        started: bool,
    ) -> None:
        """Told by `OnlineEvaluation`."""
        if not trainer.is_global_zero:
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for name, result in results.items():
            for logger in wandb_loggers(trainer):
                shown = panels(result, captions=self.captions)
                logger.log_metrics({f"media/{name}/{panel}": value for panel, value in shown.items()}, step=step)


def wandb_loggers(trainer: pl.Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def require_wandb(trainer: pl.Trainer, key: str) -> None:
    """Refuse a callback whose work would go nowhere.

    Raises:
        UserError: no W&B logger.
    """
    if not wandb_loggers(trainer) and not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError(f"{key} shows its work in W&B: say logger=[csv,wandb], or leave it out of callbacks=[…]")


def pixels(batch: Mapping[str, Any], rows: int, preprocess: Any) -> np.ndarray:
    """The first rows of `batch["image"]` as uint8 (rows, h, w, 3), normalisation undone where there is one."""
    image: Tensor = batch["image"][:rows].detach().cpu()
    if image.dtype != torch.uint8:
        mean, std = (
            batch[key][:rows].cpu()[..., None, None]
            if key in batch
            else torch.tensor(getattr(preprocess, key)).view(1, 3, 1, 1)
            for key in ("mean", "std")
        )
        image = ((image.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(image.permute(0, 2, 3, 1).numpy())


def captions(batch: Mapping[str, Any], rows: int, model: Any) -> list[str]:
    """What the model reads beside the first images: its tokens as text, or the classes that are labelled present."""
    if "text" in batch:
        return [model.tokenizer.decode(ids) for ids in batch["text"][:rows].tolist()]
    classes = model.description.get("classes", []) if "label" in batch else []
    labels = batch["label"][:rows].tolist() if classes else [[]] * rows
    return [", ".join(c for c, value in zip(classes, row, strict=True) if value == 1) or "–" for row in labels]


def panels(result: Any, *, captions: bool) -> dict[str, Any]:
    """W&B's tables and charts of one evaluation's result, by what its details hold; none where they hold nothing."""
    details = result.details
    if hasattr(details, "confusion"):
        return _classification(details)
    if hasattr(details, "image_queries"):
        return _retrieval(details, captions)
    if hasattr(details, "pairs"):
        return _multilabel(details, result.metrics)
    return {}


def _classification(details: Any) -> dict[str, Any]:
    import wandb

    names = list(details.classes)
    columns = (names, details.support, details.recall, details.f1, details.auroc)
    counts = [
        [truth, guess, count]
        for truth, row in zip(names, details.confusion, strict=True)
        for guess, count in zip(names, row, strict=True)
    ]
    found: dict[str, Any] = {
        "classes": _table(["class", "samples", "recall", "F1", "AUROC"], zip(*columns, strict=True)),
        "prompts": _table(
            ["template", "accuracy", "balanced accuracy"],
            ((prompt.template, prompt.acc1, prompt.mean_per_class_recall) for prompt in details.prompts),
        ),
        # As wandb.plot.confusion_matrix draws it, which wants every single prediction.
        "confusion": wandb.plot_table(
            "wandb/confusion_matrix/v1",
            _table(["Actual", "Predicted", "nPredictions"], counts),
            {column: column for column in ("Actual", "Predicted", "nPredictions")},
            {"title": "confusion"},
        ),
    }
    guesses = max((len(example.guesses) for example in details.examples), default=0)
    heads = [head for i in range(guesses) for head in (f"guess {i + 1}", f"probability {i + 1}")]
    rows = [
        [_picture(e.thumbnail), e.truth, *(cell for guess in e.guesses for cell in guess)] for e in details.examples
    ]
    return found | {"examples": _table(["image", "truth", *heads], rows)}


def _retrieval(details: Any, captions: bool) -> dict[str, Any]:
    most = max((len(query.hits) for query in [*details.image_queries, *details.text_queries]), default=0)
    heads = [f"hit {i + 1}" for i in range(most)]
    own = ["own caption"] if captions else []
    to_texts = []
    for query in details.image_queries:
        hits = [_hit(hit, captions) for hit in query.hits]
        text = [_short(query.text)] if captions else []
        to_texts.append([_picture(query.thumbnail), *text, query.rank, *_padded(hits, most)])
    to_images = []
    for number, query in enumerate(details.text_queries, 1):
        hits = [_picture(hit.thumbnail, _hit(hit, False)) for hit in query.hits]
        to_images.append([_short(query.text) if captions else f"caption {number}", query.rank, *_padded(hits, most)])
    return {
        "images_to_texts": _table(["image", *own, "rank of the own", *heads], to_texts),
        "texts_to_images": _table(["caption", "rank of the own", *heads], to_images),
    }


def _multilabel(details: Any, metrics: Mapping[str, float]) -> dict[str, Any]:
    rows = [
        [
            *(c.name, c.positives, c.known),
            *(_defined(metrics.get(f"{metric}:{c.name}")) for metric in ("auroc", "average_precision")),
            *(_defined(c.calibration_error), _defined(c.brier)),
        ]
        for c in details.classes
    ]
    heads = ["class", "positives", "known", "AUROC", "average precision", "calibration error", "Brier score"]
    words = {True: "present", False: "absent", None: "unknown"}
    gallery = [
        [c.name, _picture(finding.thumbnail), finding.probability, words[finding.truth]]
        for c in details.classes
        for finding in c.gallery
    ]
    return {
        "classes": _table(heads, rows),
        "gallery": _table(["class", "image", "probability", "truth"], gallery),
    }


def _hit(hit: Any, captions: bool) -> str:
    """✓ for the query's own, its cosine, and its text where asked for."""
    return f"{'✓' if hit.own else '✗'} {hit.score:.3f}" + (f" {_short(hit.text)}" if captions else "")


def _picture(jpeg: bytes, caption: str | None = None) -> Any:
    import wandb

    return wandb.Image(Image.open(BytesIO(jpeg)), caption=caption, file_type="jpg")


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[[_defined(cell) for cell in row] for row in rows])


def _defined(value: Any) -> Any:
    """None for NaN, which a table's JSON does not know."""
    return None if isinstance(value, float) and value != value else value


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _padded(cells: list[Any], length: int) -> list[Any]:
    return cells + [None] * (length - len(cells))

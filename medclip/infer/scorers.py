"""Any checkpoint as a multi-label scorer: images in, log-odds of the wanted classes out, and where it looked.

A classifier's own classes are matched by name; a CLIP is asked by pairs of prompts (see `multilabel`). A class that the
checkpoint does not know is a column of NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medclip.infer.attention import attention_map, image_tower
from medclip.infer.memory import Remembering
from medclip.infer.multilabel import PromptPair, pair_classifier
from medclip.types import Batch, DualEncoder, Preprocess, UserError

Kind = Literal["classifier", "zero-shot"]


@runtime_checkable
class Classifier(Protocol):
    """A vision-only model: `Batch -> logits (b, c)` of the classes that `description["classes"]` names."""

    preprocess: Preprocess
    description: dict[str, Any]

    def __call__(self, batch: Batch) -> Tensor: ...


class Scorer(Protocol):
    """What an evaluation asks of a checkpoint."""

    kind: Kind
    preprocess: Preprocess

    def __call__(self, batch: Batch) -> Float[Tensor, "k b c"]: ...  # log-odds; rows k > 0: by single prompt pairs

    def attention(self, batch: Batch) -> Float[Tensor, "b gh gw"] | None: ...


class ClassifierScorer:
    """A classifier, in evaluation mode on its device.

    Args:
        model: the classifier.
        classes: class -> its names; the classifier's class is looked for under the former, then the latter.

    Raises:
        UserError: the classifier has none of the classes.
    """

    kind: Kind = "classifier"

    def __init__(self, model: Classifier, classes: Mapping[str, Sequence[str]]) -> None:
        self.model = model
        self.preprocess = model.preprocess
        assert isinstance(model, nn.Module)
        self.device = next(model.parameters()).device
        own = {_plain(name): i for i, name in reversed(list(enumerate(model.description["classes"])))}
        self.columns = [
            next((own[name] for name in map(_plain, (label, *words)) if name in own), None)
            for label, words in classes.items()
        ]
        if all(column is None for column in self.columns):
            raise UserError(
                f"the classifier knows {', '.join(map(repr, model.description['classes']))}, but the evaluation asks "
                f"for {', '.join(map(repr, classes))}: give the evaluation the classifier's classes"
            )

    def __call__(self, batch: Batch) -> Float[Tensor, "1 b c"]:
        """Log-odds of the wanted classes.

        Raises:
            UserError: the classifier answers NaN.
        """
        logits = self.model(self._moved(batch)).double().cpu()
        if logits.isnan().any():
            raise UserError("the classifier answers NaN: its training diverged, or its weights are broken")
        unknown = torch.full_like(logits[:, 0], torch.nan)
        return torch.stack([unknown if c is None else logits[:, c] for c in self.columns], dim=1)[None]

    def attention(self, batch: Batch) -> Float[Tensor, "b gh gw"] | None:
        moved = self._moved(batch)
        assert isinstance(self.model, nn.Module) and "image" in moved
        return attention_map(image_tower(self.model), lambda _: self.model(moved), moved["image"])

    def _moved(self, batch: Batch) -> Batch:
        moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return Batch(**moved)  # type: ignore[typeddict-item]


class PairScorer:
    """A CLIP asked by pairs of prompts.

    Args:
        clip: the CLIP, in evaluation mode on its device.
        classes: class -> names to put into the templates.
        pairs: templates.
    """

    kind: Kind = "zero-shot"

    def __init__(self, clip: DualEncoder, classes: Mapping[str, Sequence[str]], pairs: Sequence[PromptPair]) -> None:
        self.clip = clip
        self.preprocess = clip.preprocess
        self.classifier = pair_classifier(clip, classes, pairs)

    def __call__(self, batch: Batch) -> Float[Tensor, "k b c"]:
        assert "image" in batch
        features = self.clip.encode_image(batch["image"].to(self.clip.device)).float().cpu()
        return torch.cat([self.classifier.log_odds(features)[None], self.classifier.log_odds_alone(features)])

    def attention(self, batch: Batch) -> Float[Tensor, "b gh gw"] | None:
        clip = self.clip.encoder if isinstance(self.clip, Remembering) else self.clip  # which would run no tower
        assert "image" in batch
        if not isinstance(clip, nn.Module):
            return None
        return attention_map(image_tower(clip), clip.encode_image, batch["image"].to(clip.device))


def scorer(
    model: DualEncoder | Classifier, classes: Mapping[str, Sequence[str]], pairs: Sequence[PromptPair]
) -> Scorer:
    """The scorer of a checkpoint, whichever kind it is.

    Raises:
        UserError: a classifier with none of the classes.
    """
    if isinstance(model, DualEncoder):
        return PairScorer(model, classes, pairs)
    return ClassifierScorer(model, classes)


def seen_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """Copies of some rows of all that a model without texts looks at."""
    tensors = {k: v[list(rows)] for k, v in batch.items() if k in ("image", "mean", "std") and isinstance(v, Tensor)}
    return Batch(**tensors, key=[batch["key"][i] for i in rows])  # type: ignore[typeddict-item]


def _plain(name: str) -> str:
    """Pleural_Thickening and pleural thickening are one class."""
    return " ".join(name.casefold().replace("_", " ").split())

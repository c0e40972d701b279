"""Zero-shot multi-label classification by pairs of prompts (CheXzero: Tiu et al. 2022, Nat. Biomed. Eng. 6:1399).

For each class an image is held against two texts, "pneumothorax" and "no pneumothorax", and the score of the class is
the softmax over the pair. Classes do not compete, so an image may have several findings or none. A pair is an ensemble:
each side is the renormalised mean over all its templates and all names of the class, as in `zeroshot`.

At softmax temperature T the pair's log-odds are T (cos(image, positive) - cos(image, negative)), which is what is
returned: it orders images as the probability does, without saturating.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from medclip.infer.zeroshot import by_template, embed_texts, ensemble, fill
from medclip.types import DualEncoder, UserError

LOGIT_SCALE = 100.0  # what OpenAI's and most open_clip models end at


@dataclass(frozen=True)
class PromptPair:
    """Templates of a finding's presence and absence, with `{}` or `{c}` where its name goes.

    The negative one may go without: "no acute abnormality" for a CLIP that has learnt no negations.
    """

    positive: str
    negative: str


def parse_pairs(prompts: Sequence[Mapping[str, str] | Sequence[str]]) -> list[PromptPair]:
    """Pairs from a config: `[positive, negative]` or `{positive: …, negative: …}` each.

    Raises:
        UserError: no pair, one that is none, sides that are equal, or a template without a place for the name.
    """
    pairs = []
    for given in prompts:
        sides = [given.get("positive"), given.get("negative")] if isinstance(given, Mapping) else given
        if isinstance(sides, str) or len(sides) != 2 or not all(isinstance(side, str) for side in sides):
            raise UserError(f"prompts: {given!r} is no pair: write [positive, negative], e.g. ['{{}}', 'no {{}}']")
        pair = PromptPair(str(sides[0]), str(sides[1]))
        fill(pair.positive, "")
        if pair.positive == pair.negative:
            raise UserError(f"prompts: both sides of a pair are {pair.positive!r}, which tells nothing apart")
        pairs.append(pair)
    if not pairs:
        raise UserError("prompts is empty: give at least one pair, e.g. [['{}', 'no {}']]")
    return pairs


@dataclass(frozen=True)
class PairClassifier:
    """Directions in feature space, positive minus negative: of the ensemble, and of each pair of templates alone."""

    joint: Float[Tensor, "c d"]
    alone: Float[Tensor, "t c d"]

    def log_odds(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b c"]:
        """Of unit-norm image features, by the ensemble."""
        return LOGIT_SCALE * features.double() @ self.joint.T

    def log_odds_alone(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "t b c"]:
        """The same by each pair of templates alone."""
        return LOGIT_SCALE * features.double() @ self.alone.mT


@torch.inference_mode()
def pair_classifier(
    encoder: DualEncoder, classes: Mapping[str, Sequence[str]], pairs: Sequence[PromptPair]
) -> PairClassifier:
    """The classifier of `classes` (class -> its names), float64 on the CPU."""
    sides = [
        _features(encoder, classes, templates)
        for templates in ([p.positive for p in pairs], [p.negative for p in pairs])
    ]
    joint = [ensemble(side).double() for side in sides]
    alone = [by_template(side).double() for side in sides]
    return PairClassifier(joint[0] - joint[1], alone[0] - alone[1])


def _features(
    encoder: DualEncoder, classes: Mapping[str, Sequence[str]], templates: Sequence[str]
) -> list[Float[Tensor, "t names d"]]:
    """`zeroshot.prompt_features` for templates that may lack a place for the name."""
    places = ("{c}" in t or "{}" in t for t in templates)
    slotted = list(zip(templates, places, strict=True))
    texts = [[fill(t, name) if slot else t for t, slot in slotted for name in names] for names in classes.values()]
    features = embed_texts(encoder, [text for own in texts for text in own])
    return [part.unflatten(0, (len(templates), -1)) for part in features.split([len(own) for own in texts])]

"""Values of patches: of a text by hand formula, of a slide model by its definition; others' features refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medclip.infer.heat import AttentionHeat, ClassHeat, TextHeat
from medclip.types import UserError

WORDS = ["tumor", "tumour", "stroma", "glass"]
RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((50, 4)).astype(np.float32)
OWN = {"encoder": "toy", "weights": "w"}


class ToyClip:
    """Texts are axes; the model's temperature is 10."""

    device = torch.device("cpu")
    logit_scale = torch.tensor(10.0).log()

    def tokenizer(self, texts: list[str]) -> Tensor:
        return torch.tensor([[WORDS.index(text)] for text in texts])

    def encode_text(self, text: Tensor) -> Tensor:
        return torch.eye(4)[text[:, 0]]


def encoder() -> Any:
    return SimpleNamespace(name="toy", fingerprint="w", model=ToyClip())


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_similarity_and_probability_of_a_text() -> None:
    cosines = unit(FEATURES)
    one = TextHeat(encoder(), "stroma")
    assert np.allclose(one(FEATURES, OWN, "f"), cosines[:, 2], atol=1e-6) and not one.signed
    both = (cosines[:, 0] + cosines[:, 1]) / np.sqrt(2)  # the mean of two axes, of unit norm
    less = TextHeat(encoder(), WORDS[:2], WORDS[2:])
    assert np.allclose(less(FEATURES, OWN, "f"), both - cosines[:, 2:].max(1), atol=1e-6) and less.signed
    raised = np.exp(10 * np.stack([both, cosines[:, 2], cosines[:, 3]], 1))
    share = TextHeat(encoder(), WORDS[:2], WORDS[2:], "softmax")
    assert np.allclose(share(FEATURES, OWN, "f"), raised[:, 0] / raised.sum(1), atol=1e-5) and not share.signed
    assert share.label == "probability of “tumor”, “tumour” against “stroma”, “glass”"
    assert np.allclose(one(7 * FEATURES, OWN, "f"), cosines[:, 2], atol=1e-6)


def test_features_of_other_models_are_refused() -> None:
    one = TextHeat(encoder(), "stroma")
    one(FEATURES, {"encoder": "another name", "weights": "w"}, "f")  # the weights tell
    one(FEATURES, {"encoder": "toy"}, "f")
    for about, says in (
        ({"encoder": "toy", "weights": "v"}, "f: features of other weights"),
        ({"encoder": "resnet"}, "features of encoder 'resnet', the checkpoint is 'toy'"),
        ({}, "not said"),
    ):
        with pytest.raises(UserError, match=says):
            one(FEATURES, about, "f")
    with pytest.raises(UserError, match="features of 3 numbers"):
        one(FEATURES[:, :3], OWN, "f")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (([],), "prompts is empty"),
        (("stroma", (), "softmax"), "give source.negative"),
        (("stroma", (), "dot"), "unknown"),
    ],
)
def test_sources_that_make_no_sense(words: tuple, says: str) -> None:
    with pytest.raises(UserError, match=says):
        TextHeat(encoder(), *words)


class ToyMil(nn.Module):
    """Attention: softmax of either of two numbers; logits: the mean of 3 others under the first attention."""

    def __init__(self, classes: list[str], target: str = "classes") -> None:
        super().__init__()
        self.classes, self.target, self.device = classes, target, torch.device("cpu")

    def predict(self, bag: Tensor, real: Tensor | None = None) -> Any:
        attention = bag[..., :2].softmax(1).mT
        pooled = (attention[:, :1] @ bag)[:, 0]
        scores = pooled[:, 0] if self.target == "survival" else pooled[:, : len(self.classes)].softmax(1)
        return SimpleNamespace(scores=scores, attention=attention, slide=pooled)

    def refuse(self, width: int, encoder: str | None, where: str = "") -> None:
        if width != 4 or encoder not in (None, "toy"):
            raise UserError(f"{where}: not mine")


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    raised = np.exp(x - x.max(axis, keepdims=True))
    return raised / raised.sum(axis, keepdims=True)


def test_attention_is_a_multiple_of_an_even_share() -> None:
    expected = softmax(FEATURES[:, :2].astype(float), 0) * 50
    model = ToyMil(["a", "b"])
    assert np.allclose(AttentionHeat(model)(FEATURES, OWN, "f"), expected.mean(1), atol=1e-4)
    assert np.allclose(AttentionHeat(model, 1)(FEATURES, OWN, "f"), expected[:, 1], atol=1e-4)
    assert np.allclose(AttentionHeat(model, "b")(FEATURES, OWN, "f"), expected[:, 1], atol=1e-4)
    for wrong in (2, "c"):
        with pytest.raises(UserError, match="2 attentions: choose 0 to 1, or of a, b"):
            AttentionHeat(model, wrong)(FEATURES, OWN, "f")
    with pytest.raises(UserError, match="f: not mine"):
        AttentionHeat(model)(FEATURES, {"encoder": "other"}, "f")


def test_class_probability_of_each_patch_alone() -> None:
    """A bag of one patch has all attention on it: the head's classifier on that patch."""
    three = softmax(FEATURES[:, :3].astype(float), 1)
    model = ToyMil(["a", "b", "c"])
    for of in (1, "b"):
        assert np.allclose(ClassHeat(model, of)(FEATURES, OWN, "f"), three[:, 1], atol=1e-5)
    two = ClassHeat(ToyMil(["a", "b"]))
    assert two.name == "b" and np.allclose(two(FEATURES, OWN, "f"), softmax(FEATURES[:, :2], 1)[:, 1], atol=1e-5)
    risk = ClassHeat(ToyMil([], "survival"))
    assert np.allclose(risk(FEATURES, OWN, "f"), FEATURES[:, 0], atol=1e-5) and risk.name == "risk"
    for of in (None, "d", 3):
        with pytest.raises(UserError, match="a, b, c"):
            ClassHeat(model, of)
    with pytest.raises(UserError, match="no classes"):
        ClassHeat(ToyMil([], "survival"), "a")


def test_a_clip_is_no_slide_model() -> None:
    with pytest.raises(UserError, match="no slide model"):
        AttentionHeat(nn.Identity())  # type: ignore[arg-type]

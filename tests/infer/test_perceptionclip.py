"""PerceptionCLIP against its formulas written out in NumPy, its limits, and a planted spurious attribute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from medclip.infer.perceptionclip import (
    Perception,
    State,
    Variant,
    compose,
    marginal,
    parse_factors,
    perception,
    states,
)
from medclip.infer.zeroshot import ensemble, prompt_features
from medclip.types import Preprocess, Tokenizer, UserError

VARIANTS: tuple[Variant, ...] = ("with_y", "without_y")


def unit(*shape: int, seed: int = 0) -> Tensor:
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=shape))
    return torch.nn.functional.normalize(values, dim=-1)


def by_hand(x: np.ndarray, joint: np.ndarray, pure: np.ndarray, scale: float, t: float, with_y: bool) -> np.ndarray:
    """The formulas with plain exponentials, one image at a time."""
    found = []
    for row in x:
        f = scale * np.einsum("zyd,d->zy", joint, row)
        g = np.exp(f / t).sum(axis=1) if with_y else np.exp(scale * pure @ row / t)
        p_z = g / g.sum()
        p_y = np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)
        found.append(p_z @ p_y)
    return np.array(found)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_formulas(variant: Variant, temperature: float) -> None:
    x, joint, pure = unit(5, 16), unit(4, 3, 16, seed=1), unit(4, 16, seed=2)
    got = Perception(joint, pure, variant, temperature, 30.0).log_classes(x).exp().numpy()
    want = by_hand(x.numpy(), joint.numpy(), pure.numpy(), 30.0, temperature, variant == "with_y")
    np.testing.assert_allclose(got, want, atol=1e-12)
    np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-12)


def test_identities() -> None:
    x, joint, pure = unit(5, 16), unit(4, 3, 16, seed=1), unit(4, 16, seed=2)
    f = 20 * torch.einsum("nd,zyd->nzy", x, joint)
    # At temperature 1, with y: the marginal of the joint softmax over classes and states.
    whole = f.flatten(1).softmax(dim=1).reshape(f.shape).sum(dim=1)
    torch.testing.assert_close(Perception(joint, pure, "with_y", 1.0, 20.0).log_classes(x).exp(), whole)
    # Without end, the mean of the states' posteriors, whichever way states are inferred.
    mean = f.softmax(dim=2).mean(dim=1)
    for variant in VARIANTS:
        torch.testing.assert_close(Perception(joint, pure, variant, 1e9, 20.0).log_classes(x).exp(), mean)
    # One state is plain zero-shot.
    one = Perception(joint[:1], pure[:1], "without_y", 1.0, 20.0).log_classes(x)
    torch.testing.assert_close(one, (20 * x @ joint[0].T).log_softmax(dim=1))
    # A state that is known takes the others' say.
    seeing = Perception(joint, pure, "with_y", 1.0, 20.0)
    known = torch.full((5, 4), -torch.inf, dtype=torch.float64)
    known[:, 2] = 0
    torch.testing.assert_close(seeing.given(x, known), (20 * x @ joint[2].T).log_softmax(dim=1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_large_logits_stay_finite(variant: Variant) -> None:
    x, joint, pure = unit(5, 16).float(), unit(4, 3, 16, seed=1).float(), unit(4, 16, seed=2).float()
    got = Perception(joint, pure, variant, 0.5, 4000.0).log_classes(x)
    assert got.isfinite().all()
    torch.testing.assert_close(got.exp().sum(dim=1), torch.ones(5, dtype=torch.float64))


def test_states_are_all_combinations() -> None:
    known = states(parse_factors({"stain": {"usual": "", "pale": ["pale", "weak"]}, "power": {"10x": "10x"}}, "f"))
    assert known == [State(("usual", "10x"), ("10x",)), State(("pale", "10x"), ("pale, 10x", "weak, 10x"))]
    assert compose("an image of {c}.", "tumour", "pale, 10x") == "an image of tumour, pale, 10x."
    assert compose("an image of {c}", "tumour", "") == "an image of tumour."


@pytest.mark.parametrize("bad", [{}, {"stain": {}}, {"stain": {"pale": []}}, {"stain": "pale"}])
def test_factors_that_are_none(bad: dict) -> None:
    with pytest.raises(UserError, match="factors"):
        parse_factors(bad, "factors")


class Words:
    context_length = 16

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        rows = torch.zeros(len(texts), 16, dtype=torch.long)
        for row, text in enumerate([texts] if isinstance(texts, str) else texts):
            for i, word in enumerate(text.replace(",", "").replace(".", "").split()):
                rows[row, i] = self.words.setdefault(word, len(self.words) + 1)
        return rows


class WordClip:
    """A text is the sum of its words' vectors, a word's vector random and its own."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.preprocess = Preprocess()
        self.tokenizer: Tokenizer = Words()
        self.vectors = unit(64, 32, seed=5).float()

    def encode_text(self, text: Tensor) -> Tensor:
        vectors = self.vectors[text] * (text > 0)[..., None]
        return torch.nn.functional.normalize(vectors.sum(dim=1), dim=-1)

    def encode_image(self, image: Tensor) -> Tensor:
        raise AssertionError("no image is asked for")


def test_texts_of_classes_and_states() -> None:
    clip, classes = WordClip(), {"a": ["tumour", "cancer"], "b": ["stroma"]}
    known = states(parse_factors({"stain": {"usual": "", "pale": ["pale", "weak stain"]}}, "f"))
    seeing = perception(clip, classes, "image of {c}.", known, generic="tissue")
    assert seeing.joint.shape == (2, 2, 32) and seeing.pure.shape == (2, 32)
    # The state that says nothing is plain zero-shot with the same template.
    torch.testing.assert_close(seeing.joint[0], ensemble(prompt_features(clip, classes, ["image of {c}."])))
    texts = ["image of stroma, pale.", "image of stroma, weak stain."]
    mean = torch.nn.functional.normalize(clip.encode_text(clip.tokenizer(texts)).mean(dim=0), dim=-1)
    torch.testing.assert_close(seeing.joint[1, 1], mean)
    torch.testing.assert_close(seeing.pure[0], clip.encode_text(clip.tokenizer(["image of tissue."]))[0])
    with pytest.raises(UserError, match="temperature"):
        perception(clip, classes, "{c}", known, temperature=0)
    with pytest.raises(UserError, match="with_y or without_y"):
        perception(clip, classes, "{c}", known, variant="both")  # type: ignore[arg-type]


def planted(seed: int) -> tuple[Tensor, np.ndarray, np.ndarray, Tensor, Tensor]:
    """Features with an attribute that goes with the class in 95 % of the samples and weighs more than it does."""
    rng = np.random.default_rng(seed)
    mu, nu = (np.linalg.qr(rng.normal(size=(64, 4)))[0].T[part] for part in (slice(0, 2), slice(2, 4)))
    y = rng.integers(2, size=2000)
    z = np.where(rng.random(2000) < 0.95, y, 1 - y)
    x = torch.from_numpy(mu[y] + 1.5 * nu[z] + rng.normal(0, 1 / 8, (2000, 64)))
    joint = torch.from_numpy(mu[None] + 1.5 * nu[:, None])
    alone = torch.from_numpy(mu + 0.9 * nu)  # what a class's text without the attribute has of it
    normal = torch.nn.functional.normalize
    return normal(x, dim=1), y, z, normal(joint, dim=-1), normal(alone, dim=-1)


def worst(said: Tensor, y: np.ndarray, z: np.ndarray) -> float:
    right = said.argmax(dim=1).numpy() == y
    return min(right[(y == a) & (z == b)].mean() for a in (0, 1) for b in (0, 1))


@pytest.mark.parametrize("seed", range(3))
def test_a_spurious_attribute_is_seen_through(seed: int) -> None:
    x, y, z, joint, alone = planted(seed)
    plain = 100 * x @ alone.T
    seeing = Perception(joint, joint.mean(dim=1), "with_y", 1.0, 100.0)
    got = seeing.log_classes(x)
    assert worst(got, y, z) > worst(plain, y, z) + 0.5
    assert (got.argmax(1).numpy() == y).mean() >= (plain.argmax(1).numpy() == y).mean()
    by_value = marginal(seeing.log_states(x), [State(("0",), ("",)), State(("1",), ("",))], 0)
    assert (torch.stack(list(by_value.values()), 1).argmax(1).numpy() == z).mean() > 0.9
    # Ablation: attributes of no meaning see through nothing.
    nonsense = torch.nn.functional.normalize(alone[None] + 0.3 * unit(2, 64, seed=seed + 9)[:, None], dim=-1)
    blind = Perception(nonsense, nonsense.mean(dim=1), "with_y", 1.0, 100.0).log_classes(x)
    assert worst(blind, y, z) < worst(plain, y, z) + 0.1

"""PerceptionCLIP as an evaluation: numbers by scikit-learn and by hand, groups, and an attribute that misleads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn

from medclip.evals.perceptionclip import PerceptionClassification, PerceptionOutcomes, worst_group
from medclip.evals.run import run_evaluation
from medclip.types import Batch, Preprocess, Tokenizer, UserError

DIM, SCALE = 32, 20.0
WORDS = ["image", "of", "tissue", "tumour", "stroma", "pale", "strong"]
CLASSES = {"t": "tumour", "s": "stroma"}
FACTORS: dict[str, Any] = {"stain": {"pale": "pale", "strong": "strong"}}


class Words:
    context_length = 8

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        rows = [[WORDS.index(w) for w in t.replace(",", "").replace(".", "").split()] for t in texts]
        return torch.tensor([row + [-1] * (8 - len(row)) for row in rows])


class WordClip(nn.Module):
    """A text is the sum of its words' axes; a picture's features lie in its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocess = Preprocess(size=(4, 8), mean=(0, 0, 0), std=(1, 1, 1))
        self.tokenizer: Tokenizer = Words()
        self.axes = nn.Parameter(torch.eye(DIM)[: len(WORDS)])
        self.logit_scale = nn.Parameter(torch.tensor(SCALE).log())

    @property
    def device(self) -> torch.device:
        return self.axes.device

    def encode_text(self, text: Tensor) -> Tensor:
        vectors = self.axes[text.clamp(min=0)] * (text >= 0)[..., None]
        return nn.functional.normalize(vectors.sum(dim=1).detach(), dim=-1)

    def encode_image(self, image: Tensor) -> Tensor:
        return nn.functional.normalize(image[:, 0].flatten(1).float() - 128, dim=-1)


class Pictures:
    """`features` as pictures, with what is said of each."""

    bad: Sequence[tuple[str, str, str]] = ()

    def __init__(self, features: np.ndarray, labels: Sequence[str], raw: Sequence[dict[str, Any]]) -> None:
        self.pixels = np.clip(np.round(128 + 50 * features), 0, 255).astype(np.uint8)
        self.features = self.pixels.astype(np.float64) - 128
        self.labels, self.raw = labels, raw

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, preprocess: Preprocess, batch_size: int, workers: int = 0) -> Iterator[Batch]:
        for start in range(0, len(self), batch_size):
            rows = range(start, min(start + batch_size, len(self)))
            image = torch.from_numpy(self.pixels[rows.start : rows.stop]).reshape(-1, 1, 4, 8)
            yield Batch(
                image=image.expand(-1, 3, -1, -1),
                real=torch.ones(len(rows), dtype=torch.bool),
                key=[str(i) for i in rows],
                meta=[
                    {"label": self.labels[i], "captions": [], "group": str(i // 2), "raw": self.raw[i]} for i in rows
                ],
            )


def planted(samples: int = 400, agree: float = 0.9) -> Pictures:
    """Stain goes with the class in `agree` of the samples, and weighs more than the class does."""
    rng = np.random.default_rng(0)
    y, noise = rng.integers(2, size=samples), rng.normal(0, 0.12, (samples, DIM))
    z = np.where(rng.random(samples) < agree, y, 1 - y)
    axes = np.eye(DIM)
    features = axes[[3, 4]][y] + 0.8 * axes[[5, 6]][z] + noise
    raw = [{"phantom": {"stain": ["pale", "strong"][own]}} for own in z]
    return Pictures(features, [["t", "s"][own] for own in y], raw)


def evaluation(data: Pictures, **options: Any) -> PerceptionClassification:
    own: dict[str, Any] = {
        "factors": FACTORS, "classes": CLASSES, "template": "image of {c}.", "generic": "tissue",
        "attributes": {"stain": "phantom.stain"},
    }  # fmt: skip
    return PerceptionClassification(data, name="p", **(own | options))


def outcomes_of(data: Pictures, **options: Any) -> PerceptionOutcomes:
    found = run_evaluation({"base": WordClip()}, {"p": evaluation(data, **options)}).comparisons["p"].any_result
    assert isinstance(found.outcomes, PerceptionOutcomes)
    return found.outcomes


@pytest.mark.parametrize("variant", ["with_y", "without_y"])
def test_probabilities_by_hand(variant: str) -> None:
    data = planted(6)
    got = np.exp(outcomes_of(data, variant=variant, temperature=3.0, least=1).logits)
    axes = np.eye(DIM)

    def cosine(x: np.ndarray, *words: str) -> float:
        text = sum(axes[WORDS.index(word)] for word in words)
        return float(SCALE * x @ text / np.linalg.norm(x) / np.linalg.norm(text))

    for row, x in zip(got, data.features, strict=True):
        f = np.array([[cosine(x, "image", "of", c, z) for c in ("tumour", "stroma")] for z in ("pale", "strong")])
        pure = np.array([cosine(x, "image", "of", "tissue", z) for z in ("pale", "strong")])
        weight = np.exp(f / 3).sum(axis=1) if variant == "with_y" else np.exp(pure / 3)
        given = np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(row, weight / weight.sum() @ given, atol=1e-5)


def test_every_metric_by_other_means() -> None:
    data = planted()
    outcomes = outcomes_of(data)
    weights = np.random.default_rng(1).integers(0, 3, (2, len(data))).astype(float)
    got = outcomes.values(weights)
    stain = np.array([own["phantom"]["stain"] for own in data.raw])
    # What is inferred is what the two words' axes say; the classes' words weigh the same in both states.
    said = np.where(data.features[:, 5] > data.features[:, 6], "pale", "strong")
    for i, row in enumerate(weights):
        assert got["inferred_stain"][i] == pytest.approx(np.average(said == stain, weights=row))
        for way, logits in {"": outcomes.logits, **{f"{k}_": v for k, v in outcomes.others.items()}}.items():
            right = logits.argmax(axis=1) == outcomes.labels
            groups = [(outcomes.labels == c) & (stain == z) for c in (0, 1) for z in ("pale", "strong")]
            worst = min(np.average(right[own], weights=row[own]) for own in groups)
            assert got[f"{way}worst_group_accuracy"][i] == pytest.approx(worst)
            name = f"{way}balanced_accuracy" if way else "mean_per_class_recall"
            want = balanced_accuracy_score(outcomes.labels, logits.argmax(axis=1), sample_weight=row)
            assert got[name][i] == pytest.approx(want)


def test_one_value_of_one_attribute_is_plain_zero_shot() -> None:
    data = planted(50)
    same = outcomes_of(data, factors={"stain": {"any": ""}}, attributes={})
    torch.testing.assert_close(same.logits, same.others["plain"])
    np.testing.assert_array_equal(same.others["averaged"].argmax(axis=1), same.logits.argmax(axis=1))
    assert "worst_group_accuracy" not in same.values(np.ones((1, 50)))


def test_small_groups_and_unknown_values_are_in_none() -> None:
    data = planted(60)
    data.raw[0]["phantom"].pop("stain")
    count = {(y, own["phantom"].get("stain")): 0 for y, own in zip(data.labels, data.raw, strict=True)}
    for y, own in zip(data.labels, data.raw, strict=True):
        count[y, own["phantom"].get("stain")] += 1
    small = min(n for (_, z), n in count.items() if z)
    all_in = outcomes_of(data, least=1).cells[0]
    assert all_in[0] == -1 and (all_in[1:] >= 0).all()
    some = outcomes_of(data, least=small + 1).cells[0]
    lost = sum(n for (_, z), n in count.items() if z and n <= small)
    assert (some == -1).sum() == lost + 1
    assert np.isnan(worst_group(np.ones(2, bool), [np.array([-1, -1])], np.ones((1, 2)))).all()
    # A group that a resample left out is not its worst one.
    cells, right = [np.array([0, 0, 1, 1])], np.array([True, True, False, False])
    np.testing.assert_allclose(worst_group(right, cells, np.array([[1.0, 1, 1, 1], [1, 1, 0, 0]])), [0, 1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attributes": {"power": "x"}}, "none of the factors"),
        ({"temperature": 0}, "temperature"),
        ({"factors": {}}, "evals.p.factors"),
        ({"template": "no place"}, "place|{c}"),
    ],
)
def test_configs_that_say_nothing(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        evaluation(planted(4), **options)


def test_a_field_that_no_sample_has() -> None:
    with pytest.raises(UserError, match=r"no sample has the field 'stain'"):
        evaluation(planted(4), attributes={"stain": "stain"})(WordClip())

"""Prompt ensembles against their definition, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from medclip.infer.zeroshot import by_template, embed_texts, ensemble, fill, prompt_features
from medclip.types import Preprocess, UserError


class Letters:
    """Embeds a text as the count of each letter: every text has its own known feature."""

    preprocess = Preprocess()
    device = torch.device("cpu")
    calls = 0

    class tokenizer:
        context_length = 26

        def __new__(cls, texts: list[str]) -> Tensor:  # type: ignore[misc]
            return torch.tensor([[t.count(chr(97 + i)) for i in range(26)] for t in texts])

    def encode_image(self, image: Tensor) -> Tensor:
        raise AssertionError("prompts need no image")

    def encode_text(self, text: Tensor) -> Tensor:
        self.calls += len(text)
        return normalize(text.float() + 0.1, dim=-1)


TEMPLATES = ["a photo of {c}", "{} here", "this is {c}, {c}"]
CLASSES = {"0": ["cat", "kitten"], "1": ["dog"]}


def feature(text: str) -> Tensor:
    letters = Letters()
    return letters.encode_text(letters.tokenizer([text]))[0]


def test_ensemble_is_the_renormalised_mean_over_templates_and_names() -> None:
    got = ensemble(prompt_features(Letters(), CLASSES, TEMPLATES))
    cat = [
        "a photo of cat", "a photo of kitten", "cat here", "kitten here", "this is cat, cat", "this is kitten, kitten",
    ]  # fmt: skip
    torch.testing.assert_close(got[0], normalize(torch.stack([feature(t) for t in cat]).mean(0), dim=0))
    dog = ["a photo of dog", "dog here", "this is dog, dog"]
    torch.testing.assert_close(got[1], normalize(torch.stack([feature(t) for t in dog]).mean(0), dim=0))
    torch.testing.assert_close(got.norm(dim=1), torch.ones(2))


def test_a_template_alone_averages_over_names_only() -> None:
    got = by_template(prompt_features(Letters(), CLASSES, TEMPLATES))
    assert got.shape == (3, 2, 26)
    want = normalize(feature("cat here") + feature("kitten here"), dim=0)
    torch.testing.assert_close(got[1, 0], want)
    one = prompt_features(Letters(), CLASSES, TEMPLATES[:1])
    torch.testing.assert_close(by_template(one)[0], ensemble(one))


def test_the_same_text_is_encoded_once_and_order_is_kept() -> None:
    letters = Letters()
    got = embed_texts(letters, ["b", "a", "b", "c"], batch_size=2)
    assert letters.calls == 3
    torch.testing.assert_close(got, torch.stack([feature(t) for t in "babc"]))


def test_a_template_without_a_place_for_the_name_is_refused() -> None:
    assert fill("{c} and {}", "x") == "x and x"
    with pytest.raises(UserError, match="no place for the class name"):
        fill("a photo", "cat")

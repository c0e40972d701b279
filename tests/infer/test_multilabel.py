"""Prompt pairs against the softmax they stand for."""

from __future__ import annotations

import pytest
import torch

from medclip.infer.multilabel import PromptPair, pair_classifier, parse_pairs
from medclip.types import UserError
from tests.evals.eval_toys import ColourClip

PAIRS = [PromptPair("a {} square", "blue {}"), PromptPair("picture of {}", "green blue {}")]


def test_log_odds_are_those_of_the_softmax_over_the_pair() -> None:
    clip = ColourClip(0.7)
    images = torch.randint(0, 255, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = clip.encode_image(images)
    found = pair_classifier(
        clip, {"red": ["red", "crimson"], "blue": ["blue"]}, [PromptPair("a {}", "green {c} square")]
    )
    for column, names in enumerate((["red", "crimson"], ["blue"])):
        sides = []
        for template in ("a {}", "green {} square"):
            texts = clip.encode_text(clip.tokenizer([template.format(name) for name in names])).mean(dim=0)
            sides.append(features @ texts / texts.norm())
        probability = torch.softmax(100 * torch.stack(sides, dim=1), dim=1)[:, 0].double()
        assert probability.std() > 0.01
        got = torch.sigmoid(found.log_odds(features)[:, column])
        torch.testing.assert_close(got, probability, atol=1e-5, rtol=1e-4)


def test_a_single_pair_alone_is_the_ensemble_and_several_are_told_apart() -> None:
    clip = ColourClip(0.7)
    features = clip.encode_image(torch.full((1, 3, 8, 8), 90, dtype=torch.uint8))
    classes = {"red": ["red"], "green": ["green"]}
    both = pair_classifier(clip, classes, PAIRS)
    for t, pair in enumerate(PAIRS):
        single = pair_classifier(clip, classes, [pair])
        torch.testing.assert_close(single.log_odds(features), single.log_odds_alone(features)[0])
        torch.testing.assert_close(single.log_odds(features), both.log_odds_alone(features)[t])
    assert not torch.allclose(both.log_odds(features), both.log_odds_alone(features)[0])


def test_an_absence_without_a_name_is_the_same_for_all_classes() -> None:
    clip = ColourClip(0.7)
    found = pair_classifier(clip, {"red": ["red", "crimson"], "green": ["green"]}, [PromptPair("{}", "dark blue")])
    rest = clip.encode_text(clip.tokenizer(["blue"]))[0].double()
    for row, names in enumerate((["red", "crimson"], ["green"])):
        own = torch.nn.functional.normalize(clip.encode_text(clip.tokenizer(names)).mean(dim=0), dim=0).double()
        torch.testing.assert_close(found.joint[row], own - rest, atol=1e-6, rtol=0)


def test_pairs_of_a_config() -> None:
    assert parse_pairs([["{}", "no {}"], {"positive": "{c} seen", "negative": "{c} not seen"}]) == [
        PromptPair("{}", "no {}"),
        PromptPair("{c} seen", "{c} not seen"),
    ]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts is empty"),
        (["{}"], "is no pair"),
        ([["{}", "no {}", "maybe {}"]], "is no pair"),
        ([{"positive": "{}"}], "is no pair"),
        ([["no finding", "no {}"]], "no place for the class name"),
        ([["{}", "{}"]], "tells nothing apart"),
    ],
)
def test_what_is_no_pair_is_refused(prompts: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_pairs(prompts)

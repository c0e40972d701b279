"""A CLIP's text tower as a question encoder: its states pooled and projected are the CLIP's own text features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medclip.models.load import load_clip
from medclip.models.question_clip import QuestionClip

TEXTS = ["left lung", "is there a nodule of the liver", "ct"]


def test_states_become_the_clips_features(vit_cfg: dict):
    clip = load_clip(vit_cfg).eval()
    text = clip.tokenizer(TEXTS)
    with torch.no_grad():
        features, projection = clip.encode_text(text), clip.net.text_projection
        questions = QuestionClip(clip).eval()
        asked = questions(text)
    pooled = asked.states[torch.arange(3), text.argmax(1)]
    torch.testing.assert_close(F.normalize(pooled @ projection, dim=1), features)
    assert asked.real.sum(1).tolist() == [questions.tokenizer.count(one) for one in TEXTS]


def test_a_bert_tower_hands_on_its_last_states(bert_cfg: dict):
    clip = load_clip(bert_cfg).eval()
    text = clip.tokenizer(TEXTS)
    inner = clip.net.text.transformer
    with torch.no_grad():
        mask = (text != 0).long()
        expected = inner(input_ids=text, attention_mask=mask).last_hidden_state
        asked = QuestionClip(clip).eval()(text)
    torch.testing.assert_close(asked.states, expected)
    assert torch.equal(asked.real, text != 0)


def test_any_family_comes_back_from_its_description(any_cfg: dict):
    torch.manual_seed(0)
    questions = QuestionClip(load_clip(any_cfg)).eval()
    again = QuestionClip.from_description({k: v for k, v in questions.description.items() if k != "part"}).eval()
    again.load_state_dict(questions.state_dict())
    text = questions.tokenizer(TEXTS)
    assert torch.equal(again(text).states, questions(text).states)
    assert questions(text).states.shape[2] == questions.dim and questions(text).embedded.shape[2] == questions.width


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_towers_stay_and_free_ones_have_all_their_gradients(any_cfg: dict, frozen: bool):
    questions = QuestionClip(load_clip(any_cfg), frozen=frozen).train()
    asked = questions(questions.tokenizer(TEXTS))
    assert asked.states.requires_grad != frozen
    if frozen:
        assert not any(p.requires_grad for p in questions.parameters()) and not questions.net.training
    else:
        asked.states.sum().backward()
        lacking = [n for n, p in questions.named_parameters() if p.requires_grad and p.grad is None]
        assert not [name for name in lacking if "pooler" not in name]

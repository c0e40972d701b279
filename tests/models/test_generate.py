"""Answers in words: against transformers' own generation and loss, and what is trained of the language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from medclip.losses.spoken import SpokenLoss
from medclip.models.generate import Speaker, build_generate, speaker_from
from medclip.models.language import IGNORED, load_language
from medclip.types import Batch, UserError
from tests.models.language_toys import language_folder

ANSWERS = ["yes", "no", "left lung", "the red heart"]
TEXTS = ["is there a lung", "what organ is this in the picture", "what"]


class Cells(nn.Module):
    """Mean colours of four quarters."""

    dim = 3
    preprocess = None
    description: ClassVar = {"part": "never made again in these tests"}

    def forward(self, batch: Batch) -> Tensor:
        image = batch["image"].float() / 255  # pyright: ignore
        return nn.functional.adaptive_avg_pool2d(image, 2).flatten(2).transpose(1, 2)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    kind = request.param
    return language_folder(tmp_path_factory.mktemp(kind), kind=kind, start=kind == "llama")


def model(folder: Path, **language: Any) -> Speaker:
    torch.manual_seed(1)
    asked = build_generate(ANSWERS, Cells(), {"folder": str(folder), **language}, length=14, answer_length=5)
    with torch.no_grad():
        asked.project[-1].weight.mul_(20)  # type: ignore[union-attr, operator]  # so that the image counts
    return asked.eval()


def batch(asked: Speaker, right: tuple[int | None, ...] = (0, 3, None)) -> Batch:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (len(TEXTS), 3, 8, 8), dtype=torch.uint8, generator=generator)
    label = torch.zeros(len(TEXTS), len(ANSWERS))
    for row, answer in enumerate(right):
        if answer is not None:
            label[row, answer] = 1
    return Batch(image=image, text=asked.tokenizer(TEXTS), label=label, key=list("abc"))


def by_hand(asked: Speaker, given: Batch, row: int) -> Tensor:
    """Embeddings of one row's prompt, without any padding."""
    assert "text" in given
    objects = asked.project(asked.visual(given))[row]
    ids = [i for i in given["text"][row].tolist() if i != asked.tokenizer.padding]
    start = [] if asked.tokenizer.start is None else [asked.tokenizer.start]
    embed = asked.language.embed
    return torch.cat([embed(torch.tensor(start, dtype=torch.long)), objects, embed(torch.tensor(ids))])[None]


@torch.no_grad()
def test_greedy_answers_are_those_of_transformers(folder: Path):
    asked = model(folder)
    given = batch(asked)
    told = asked.answer(given)
    assert len(set(told.texts)) > 1
    for row, text in enumerate(told.texts):
        inputs = by_hand(asked, given, row)
        net: Any = asked.language.net
        ids = net.generate(inputs_embeds=inputs, max_new_tokens=5, do_sample=False, pad_token_id=2)[0].tolist()
        assert text == asked.tokenizer.decode(ids)


@torch.no_grad()
def test_loss_is_the_likelihood_of_each_answer_by_itself(folder: Path):
    asked = model(folder)
    given = batch(asked)
    out = asked(given)
    assert out.target[2].eq(IGNORED).all()
    total = 0.0
    for row, answer in ((0, "yes"), (1, "the red heart")):
        ids = [*asked.tokenizer.inner(answer, add_special_tokens=False).input_ids, asked.tokenizer.end]
        inputs = torch.cat([by_hand(asked, given, row), asked.language.embed(torch.tensor(ids))[None]], 1)
        logits = asked.language.net(inputs_embeds=inputs).logits[0, -len(ids) - 1 : -1]
        total -= float(logits.log_softmax(1)[range(len(ids)), ids].sum())
    assert float(SpokenLoss()(out, given)) == pytest.approx(total / 2, rel=1e-5)


@torch.no_grad()
def test_scores_are_of_known_answers_alone_and_the_attention_is_of_the_image(folder: Path):
    asked = model(folder)
    given = batch(asked)
    told = asked.answer(given)
    assert torch.allclose(told.attention.sum((2, 3)), torch.ones(3, 2)) and told.attention.shape == (3, 2, 4, 1)
    for text, scores, probability in zip(told.texts, told.scores, told.probability, strict=True):
        if text in ANSWERS:
            assert float(scores[ANSWERS.index(text)].sigmoid()) == pytest.approx(float(probability), abs=1e-5)
        else:
            assert scores.isneginf().all()
    asked.answers, asked._places = [*told.texts], {text: i for i, text in enumerate(told.texts)}
    known = asked.answer(given).scores
    assert [int(row.argmax()) for row in known] == [asked._places[text] for text in told.texts]
    assert (known > -torch.inf).sum() == len(TEXTS)
    other = batch(asked)
    other["image"] = 255 - other["image"]  # pyright: ignore
    assert not torch.equal(asked.answer(other).probability, told.probability)


def test_what_is_trained(folder: Path):
    frozen, lora = model(folder).train(), model(folder, lora={"rank": 2, "alpha": 4}).train()
    assert not any(p.requires_grad for p in frozen.language.parameters()) and not frozen.language.net.training
    assert all(p.requires_grad for p in model(folder, frozen=False).language.parameters())
    trained = {name for name, p in lora.language.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    given = batch(lora)
    lora.project.load_state_dict(frozen.project.state_dict())
    with torch.no_grad():  # adapters begin at nothing
        torch.testing.assert_close(lora(given).logits, frozen(given).logits)
    SpokenLoss()(lora(given), given).backward()
    moved = [p.grad.abs().sum() for n, p in lora.named_parameters() if "lora_B" in n and p.grad is not None]
    assert len(moved) == len([n for n in trained if "lora_B" in n]) and all(grad > 0 for grad in moved)


def test_a_description_makes_it_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked = model(folder, lora={"rank": 2, "alpha": 4})
    monkeypatch.setattr("medclip.models.generate.rebuild", lambda about: Cells())
    again = speaker_from(json.loads(json.dumps(asked.description)))
    again.load_state_dict(asked.state_dict())
    given = batch(asked)
    with torch.no_grad():
        assert torch.equal(again.eval()(given).logits, asked(given).logits)
    assert torch.equal(again.tokenizer(TEXTS), asked.tokenizer(TEXTS))


def test_prompts_are_cut_within_the_question(folder: Path):
    tokens = load_language(str(folder)).tokens("question: {} answer:", 7)
    ids = tokens(["is there a lung in the picture", "what"])
    assert tokens.decode(ids[0].tolist()) == "question : is there a answer :"
    assert ids[1].tolist()[:2] == [tokens.padding] * 2
    answers = tokens.answers(["left lung", "the red heart in the picture"], 4)
    assert answers[0, 2:].tolist() == [tokens.end, IGNORED] and int(answers[1, 3]) == tokens.end


def test_bad_folders(tmp_path: Path, folder: Path):
    with pytest.raises(UserError, match=r"has no config\.json: give a local folder"):
        load_language(str(tmp_path))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"no weights as \.safetensors"):
        load_language(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 64)
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_text(file.read_text())
    with pytest.raises(UserError, match="holds no causal language model that can be read"):
        load_language(str(tmp_path))
    own_code = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Net"}}
    (tmp_path / "config.json").write_text(json.dumps(own_code))
    with pytest.raises(UserError, match="asks for code of its own"):
        load_language(str(tmp_path))


def test_bad_settings(folder: Path):
    language = {"folder": str(folder)}
    with pytest.raises(UserError, match=r"say data\.labels\.field=vqa\.answer"):
        build_generate(["closed: yes"], Cells(), language)
    with pytest.raises(UserError, match="the prompt alone takes 4"):
        build_generate(ANSWERS, Cells(), language, length=4)
    with pytest.raises(UserError, match=r"write one \{\} where the question goes"):
        build_generate(ANSWERS, Cells(), language, prompt="answer:")
    with pytest.raises(UserError, match="rank 0"):
        build_generate(ANSWERS, Cells(), language | {"lora": {"rank": 0}})


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers: pip install 'medclip-adapt\[hf\]'"):
        load_language(str(folder))

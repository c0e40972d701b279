"""VqaTask: what validation counts, by hand; and a run that learns, killed and resumed to the bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from medclip.heads.ban import Ban
from medclip.heads.qcr import Qcr
from medclip.heads.question_type import QuestionType
from medclip.losses.answers import AnswersLoss, TypesLoss
from medclip.models.vqa import build_vqa
from medclip.optim.epochs import by_epochs
from medclip.tasks.vqa import VqaTask, counted
from medclip.types import UserError
from tests.models.test_vqa import ANSWERS, Mean, encoder
from tests.tasks.rows import Loader, Losses, SaveAndDie, Stream, trainer

QUESTIONS = ["is there a lung", "what organ is this"]


def task(lr: float = 0.02) -> VqaTask:
    torch.manual_seed(0)
    head = partial(Qcr, fusion=partial(Ban, glimpses=1))
    model = build_vqa(ANSWERS[:4], encoder(), head, Mean(), partial(QuestionType))
    return VqaTask(
        model,
        {"answers": AnswersLoss(), "types": TypesLoss()},
        optimizer=partial(_adamax, lr=lr),
        schedule=lambda optimizer, total: by_epochs(optimizer, total, epochs=1),
    )


def _adamax(named: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adamax(named, lr=lr)


def batch(number: int, n: int = 6, rows: int = 6) -> dict[str, Any]:
    """Red images show a lung, blue ones a liver; asked whether there is a lung, or which organ it is."""
    generator = torch.Generator().manual_seed(number)
    lung, is_open = torch.randint(0, 2, (2, rows), generator=generator).bool()
    image = torch.randint(0, 60, (rows, 3, 8, 8), dtype=torch.uint8, generator=generator)
    image[lung, 0] += 150
    image[~lung, 2] += 150
    label = torch.zeros(rows, 4)
    label[torch.arange(rows), 2 * is_open + ~lung] = 1
    text = encoder().tokenizer([QUESTIONS[int(one)] for one in is_open])
    image[n:], label[n:] = 0, 0
    keys = [f"{number}-{row}" for row in range(n)]
    return {"image": image, "text": text, "label": label, "key": keys, "epoch": 0, "skipped": 0}


def test_counts_by_hand():
    right = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    scores = torch.tensor([[2.0, 1, 0, 0], [2, 1, 0, 0], [0, 0, 9, 0], [-torch.inf, -torch.inf, 0, 1], [1, 0, 0, 0]])
    told = torch.tensor([0.9, 0.2, 0.7, 0.1, 0.9])
    found = counted(scores, told, right, 2).tolist()
    assert found == [[3, 5], [1, 2], [2, 2], [2, 4]]
    unsaid = counted(torch.full((5, 4), -torch.inf), told, right, 2)  # none of the answers is not the first of them
    assert unsaid[0].tolist() == [0, 5]
    unrouted = counted(scores, torch.full((5,), torch.nan), right, 0).tolist()
    assert unrouted == [[3, 5], [0, 0], [0, 0], [0, 0]]


def test_validation_is_what_a_test_would_say(tmp_path: Path):
    asked = task().eval()
    parts = [batch(0), batch(1, 4), batch(2)]
    parts[2]["label"][1] = 0  # a right answer that is not among the model's
    found = trainer(tmp_path).validate(asked, Loader(parts), verbose=False)[0]
    hits, types = [], []
    for part in parts:
        n = len(part["key"])
        with torch.no_grad():
            scores = asked.model.answer(part).scores[:n]  # type: ignore[operator]
        hits += [bool(part["label"][row, scores[row].argmax()]) for row in range(n)]
        types += [
            {(True, False): "closed", (False, True): "open"}.get((bool(row[:2].any()), bool(row[2:].any())))
            for row in part["label"][:n]
        ]
    assert len(hits) == 16 and types.count(None) == 1
    assert found["val/accuracy"] == pytest.approx(sum(hits) / 16)
    for kind in ("closed", "open"):
        own = [hit for hit, type_ in zip(hits, types, strict=True) if type_ == kind]
        assert found[f"val/accuracy/{kind}"] == pytest.approx(sum(own) / len(own))
    assert 0 <= found["val/routing"] <= 1 and {"val/answers", "val/types", "val/loss"} <= set(found)


def test_learns_to_answer_and_to_route(tmp_path: Path):
    asked = task()
    trainer(tmp_path, gradient_clip_val=0.25).fit(asked, Stream([batch(number) for number in range(200)]))
    found = trainer(tmp_path).validate(asked, Loader([batch(1000 + i) for i in range(10)]), verbose=False)[0]
    assert found["val/accuracy"] > 0.95 and found["val/routing"] == 1


def test_killed_and_resumed_is_the_same_run(tmp_path: Path):
    whole, first, second = Losses(), Losses(), Losses()
    batches = [batch(number) for number in range(6)]
    trainer(tmp_path, whole).fit(task(), Stream(batches))
    with pytest.raises(SystemExit):
        trainer(tmp_path, first, SaveAndDie(tmp_path / "at3.ckpt", 3)).fit(task(), Stream(batches))
    trainer(tmp_path, second).fit(task(), Stream(batches), ckpt_path=str(tmp_path / "at3.ckpt"), weights_only=True)
    assert (first.seen[:3] + second.seen)[:6] == whole.seen


def test_a_batch_of_bad_samples_counts_nothing(tmp_path: Path):
    found = trainer(tmp_path).validate(task().eval(), Loader([batch(0, 0), batch(1)]), verbose=False)[0]
    assert found["val/accuracy"] * 6 == pytest.approx(round(found["val/accuracy"] * 6))
    with pytest.raises(UserError, match="no question that could be read"):
        trainer(tmp_path).validate(task().eval(), Loader([batch(0, 0)]), verbose=False)


def test_labels_that_are_not_the_models_answers(tmp_path: Path):
    part = batch(0)
    part["label"] = part["label"][:, :3]
    with pytest.raises(UserError, match="the data have 3 answers, the model 4"):
        trainer(tmp_path).fit(task(), Stream([part]))
    del part["label"]
    with pytest.raises(UserError, match=r"no answers: say data\.labels"):
        trainer(tmp_path).fit(task(), Stream([part]))

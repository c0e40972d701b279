"""The model: branches by true type in training and by the router in tests, and what its checkpoints say of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medclip.heads.ban import Ban
from medclip.heads.mevf import Mevf
from medclip.heads.qcr import Qcr
from medclip.heads.question_type import QuestionType
from medclip.models.any import load_any
from medclip.models.parts import find, named
from medclip.models.question_rnn import QuestionRnn
from medclip.models.vqa import TYPES, VqaModel, build_vqa
from medclip.types import Batch, Preprocess, UserError

ANSWERS = ["closed: yes", "closed: no", "open: lung", "open: liver", "open: brain"]
WORDS = ["is", "there", "a", "lung", "what", "organ", "this"]
TRAINED = partial(QuestionType)
TEXTS = ["is there a lung", "what organ is this", "is this a lung", "what is this organ"]


class Mean(nn.Module):
    """One object: the mean colour; its error is the first pixel."""

    dim = 3
    preprocess = Preprocess(size=(8, 8))

    @property
    def description(self) -> dict[str, Any]:
        return {"part": "never made again in these tests"}

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        image = batch["image"].float() / 255
        return image.mean((2, 3)).unsqueeze(1), image[:, 0, 0, 0]


def encoder(**options: Any) -> QuestionRnn:
    return QuestionRnn(WORDS, **{"embedding": 6, "hidden": 8, "length": 5, **options})


def model(kind: str = "qcr", visual: bool = True, types: Any = TRAINED, **options: Any) -> VqaModel:
    torch.manual_seed(0)
    head = partial(Mevf, fusion=Ban) if kind == "mevf" else partial(Qcr, fusion=partial(Ban, glimpses=3))
    types = None if kind == "mevf" else types
    return build_vqa(options.get("answers", ANSWERS), encoder(), head, Mean() if visual else None, types).eval()


def batch(asked: VqaModel, right: list[int | None], rows: int = 4) -> Batch:
    label = torch.zeros(rows, len(ANSWERS))
    for row, answer in enumerate(right):
        if answer is not None:
            label[row, answer] = 1
    image = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    text = asked.tokenizer(TEXTS)
    return {"image": image[:rows], "text": text[:rows], "label": label, "key": [str(i) for i in range(rows)]}


class Told(nn.Module):
    """A router that knows."""

    frozen = True

    def __init__(self, closed: list[bool]) -> None:
        super().__init__()
        self.odds = torch.tensor([4.0 if one else -4.0 for one in closed])

    def forward(self, text: Tensor) -> Tensor:
        return self.odds[: len(text)]


def test_a_perfect_router_answers_as_routing_by_true_type():
    asked = model()
    given = batch(asked, [0, 2, 1, 4])
    by_type = asked(given)
    asked.router = Told([True, False, True, False])  # type: ignore[assignment]
    found = asked.answer(given)
    own = torch.tensor([[True] * 2 + [False] * 3, [False] * 2 + [True] * 3] * 2)
    assert torch.equal(by_type.own, own)
    assert torch.equal(found.scores.isfinite(), own)
    assert torch.equal(found.scores[own], by_type.logits[own])
    assert torch.equal(found.attention, by_type.attention)
    assert ((found.closed > 0.5) == torch.tensor([True, False, True, False])).all()
    asked.router = Told([False, True, False, True])  # type: ignore[assignment]
    assert torch.equal(asked.answer(given).scores.isfinite(), ~own)


def test_a_right_answer_that_is_not_known_is_of_no_branch():
    asked = model()
    out = asked(batch(asked, [0, None, None, 4]))
    assert out.own.any(1).tolist() == [True, False, False, True]
    assert out.logits[0, :2].abs().sum() > 0


def test_one_row_alone_and_twice():
    for kind in ("qcr", "mevf"):
        asked = model(kind)
        whole, alone = asked(batch(asked, [0, 2, 1, 4])), asked(batch(asked, [0], 1))
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(a[:1], b, equal_nan=True)
        given = batch(asked, [0, 2, 1, 4])
        for a, b in zip(asked.answer(given), asked.answer(given), strict=True):
            assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))
        assert torch.equal(whole.drawn, given["image"][:, 0, 0, 0] / 255)


def test_without_a_router_all_answers_compete():
    asked = model("mevf")
    given = batch(asked, [0, 2, 1, 4])
    found = asked.answer(given)
    assert found.closed.isnan().all() and torch.equal(found.scores, asked(given).logits)
    assert asked(given).own.all()


def test_the_router_learns_of_types_alone():
    """Its loss moves it and nothing else; the answers' loss does not move it."""
    asked = model().train()
    out = asked(batch(asked, [0, 2, 1, 4]))
    assert asked.router is not None
    out.closed.sum().backward(retain_graph=True)
    moved = {name.split(".")[0] for name, p in asked.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"router"}
    asked.zero_grad()
    out.logits.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in asked.router.parameters())


def save(path: Path, asked: nn.Module, **changes: Any) -> str:
    """As tasks save it."""
    state = {f"model.{key}": value for key, value in asked.state_dict().items()}
    torch.save({"medclip": {**asked.description, **changes}, "state_dict": state}, path)
    return str(path)


def types_model(**options: Any) -> VqaModel:
    torch.manual_seed(5)
    return build_vqa(TYPES, encoder(**{"tables": 1, **options}), partial(QuestionType)).eval()


def test_a_trained_router_is_taken_over_and_stays(tmp_path: Path):
    types = types_model()
    path = save(tmp_path / "types.ckpt", types)
    asked = model(types=path).train()
    given = batch(asked, [0, 2, 1, 4])
    logits = types(given).logits
    router = asked.router
    assert router is not None and not router.training and not any(p.requires_grad for p in router.parameters())
    assert torch.equal(router(given["text"]), logits[:, 0] - logits[:, 1])
    assert asked(given).closed.isnan().all()  # nothing to learn


def test_routers_that_do_not_fit_are_one_line(tmp_path: Path):
    other = save(tmp_path / "other.ckpt", build_vqa(TYPES, QuestionRnn(["x"], hidden=8), partial(QuestionType)))
    with pytest.raises(UserError, match=r"trained on other words than model\.questions"):
        model(types=other)
    with pytest.raises(UserError, match=r"trained on other words than model\.questions"):
        model(types=save(tmp_path / "long.ckpt", types_model(length=9)))
    whole = save(tmp_path / "qcr.ckpt", model(visual=True))
    with pytest.raises(UserError, match="tells no types: give a checkpoint of medclip train experiment=medvqa_type"):
        model(types=whole)


@pytest.mark.parametrize("kind", ["mevf", "type"])
def test_a_checkpoint_comes_back_by_itself(tmp_path: Path, kind: str):
    asked = types_model() if kind == "type" else build_vqa(ANSWERS, encoder(), partial(_Blind, scale=2)).eval()
    path = tmp_path / "best.ckpt"
    if kind == "mevf":
        with pytest.raises(UserError, match=r"names a part '.*_Blind', which this version of medclip does not have"):
            load_any(pretrained=save(path, asked))
        return
    back = load_any(pretrained=save(path, asked)).eval()
    assert isinstance(back, VqaModel) and back.description == asked.description
    given = batch(asked, [0, 1, 1, 0])
    assert torch.equal(back(given).logits, asked(given).logits)
    fresh = load_any(pretrained=f"random:{path}").eval()
    assert not torch.equal(fresh(given).logits, asked(given).logits)


class _Blind(nn.Module):
    """A head of somebody else's."""

    routed = False

    def __init__(self, objects: int, questions: QuestionRnn, answers: int, closed: int, scale: int) -> None:
        super().__init__()


def test_a_checkpoint_names_parts_of_ours_and_nothing_else():
    made = find({"part": "heads.mevf.Mevf", "fusion": {"part": "heads.ban.Ban", "glimpses": 4}})
    assert made.func is Mevf and made.keywords["fusion"].keywords == {"glimpses": 4}
    for name in (
        "models.load.load_clip",
        "models.encoder.Path",
        "os.system",
        "heads.mevf.nn.Linear",
        "heads.mevf.Linear",
        "heads.mevf.nn",
        "heads.../x.Y",
        None,
        ["heads.mevf.Mevf"],
    ):
        with pytest.raises(UserError, match="which this version of medclip does not have"):
            named(name)


def test_what_does_not_go_together_is_one_line():
    with pytest.raises(UserError, match="but 0 of 3 answers are closed"):
        model(answers=["yes", "no", "lung"])
    with pytest.raises(UserError, match="must come first"):
        model("mevf", answers=["open: lung", "closed: yes"])
    with pytest.raises(UserError, match="name each answer once"):
        model("mevf", answers=["yes", "yes"])
    with pytest.raises(UserError, match=r"the model has no answers: say data\.labels"):
        model("mevf", answers=[])
    with pytest.raises(UserError, match=r"needs to know which questions are closed: say model\.types"):
        model(types=None)
    asked = model("mevf")
    given = batch(asked, [0, 2, 1, 4])
    del given["text"]
    with pytest.raises(UserError, match=r"hand out no questions: say .*data\.sources\.0\.questions"):
        asked(given)

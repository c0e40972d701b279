"""Heads: branches, routing, batches of one type, and that a test has no chance in it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from medclip.heads.ban import Ban
from medclip.heads.gated import GatedWords
from medclip.heads.mevf import Mevf
from medclip.heads.qcr import Qcr
from medclip.heads.question_type import QuestionType
from medclip.heads.san import San
from medclip.heads.xattn import CrossAttention
from medclip.losses.answers import answers_loss
from medclip.types import Asked, UserError
from tests.heads.toys import encoder, objects, texts

ANSWERS, CLOSED = 5, 2


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    questions = encoder()
    sizes = {"objects": 6, "questions": questions, "answers": ANSWERS, "closed": CLOSED}
    return {
        "mevf_ban": Mevf(**sizes, fusion=Ban),
        "mevf_san": Mevf(**sizes, fusion=San),
        "qcr": Qcr(**sizes, fusion=partial(Ban, glimpses=3)),
        "xattn": CrossAttention(**sizes, dim=8, heads=2),
        "type": QuestionType(6, questions),
    }


def judge(head: nn.Module, rows: int, closed: list[bool] | None = None):
    text = texts(rows)
    taken = torch.tensor(closed if closed is not None else [i % 2 == 0 for i in range(rows)])
    torch.manual_seed(7)
    asked = encoder()(text)
    return head(objects(rows), asked, text, taken)


@pytest.mark.parametrize("name", heads())
def test_a_test_twice_is_the_same_and_training_is_not(name: str):
    head = heads()[name].eval()
    assert all(torch.equal(a, b) for a, b in zip(judge(head, 4), judge(head, 4), strict=True))
    asked, taken = encoder()(texts(4)), torch.tensor([True, False, True, False])
    head.train()
    assert not torch.equal(*(head(objects(4), asked, texts(4), taken).logits for _ in range(2)))


@pytest.mark.parametrize("name", heads())
def test_a_row_is_the_same_alone_and_attention_sums_to_one(name: str):
    head = heads()[name].eval()
    whole, alone = judge(head, 4), judge(head, 1)
    for a, b in zip(whole, alone, strict=True):
        torch.testing.assert_close(a[:1], b)
    torch.testing.assert_close(whole.attention.sum((2, 3)), torch.ones(whole.attention.shape[:2]))


@pytest.mark.parametrize(
    "closed", [[True] * 4, [False] * 4, [True, False, False, True]], ids=["closed", "open", "both"]
)
def test_qcr_takes_each_row_through_its_branch_alone(closed: list[bool]):
    head = heads()["qcr"].eval()
    logits, own, _ = judge(head, 4, closed)
    for row, is_closed in enumerate(closed):
        columns = list(range(CLOSED)) if is_closed else list(range(CLOSED, ANSWERS))
        assert own[row].nonzero().flatten().tolist() == columns
        assert (logits[row, ~own[row]] == 0).all() and (logits[row, columns] != 0).all()
    # What a branch says of a row does not depend on the rows beside it.
    torch.testing.assert_close(logits[:1], judge(head, 1, closed[:1]).logits)


@pytest.mark.parametrize("closed", [True, False])
def test_qcr_with_questions_of_one_type_has_no_nan_and_no_missing_gradient(closed: bool):
    head = heads()["qcr"].train()
    logits, own, _ = judge(head, 4, [closed] * 4)
    label = torch.zeros(4, ANSWERS)
    label[:, 0 if closed else 4] = 1

    loss = answers_loss(logits, label, own, "mean")
    columns = slice(0, CLOSED) if closed else slice(CLOSED, ANSWERS)
    alone = nn.functional.binary_cross_entropy_with_logits(logits[:, columns], label[:, columns])
    torch.testing.assert_close(loss, alone)
    loss.backward()
    names = {name for name, p in head.named_parameters() if p.grad is None}
    assert not names
    idle, busy = head.classifiers[int(closed)], head.classifiers[int(not closed)]
    assert all((p.grad == 0).all() for p in idle.parameters())
    assert all(p.grad.isfinite().all() for p in head.parameters())
    assert any((p.grad != 0).any() for p in busy.parameters())


def test_qcrs_reason_multiplies_what_was_fused():
    head = heads()["qcr"].eval()
    before = judge(head, 4).logits
    with torch.no_grad():  # r(q) = 0: the classifiers see nothing, so that all rows of a branch are alike
        head.reasoning.layers[-1].weight.zero_()
        head.reasoning.layers[-1].bias.zero_()
    after = judge(head, 4).logits
    torch.testing.assert_close(after[0], after[2])
    assert not torch.allclose(before[0], before[2])


def test_gated_attention_is_its_formula():
    torch.manual_seed(0)
    gate, asked = GatedWords(6, 8), encoder(tables=1)(texts(3))
    both = torch.cat([asked.embedded, asked.states], 2)
    g = torch.tanh(gate.tanh_gate(both)) * torch.sigmoid(gate.sigmoid_gate(both))
    score = torch.einsum("bjc,c->bj", g, gate.score.weight[0])
    share = score.exp() / score.exp().sum(1, keepdim=True)
    vector, found = gate(asked)
    torch.testing.assert_close(found, share)
    torch.testing.assert_close(vector, torch.einsum("bj,bjc->bc", share, asked.states))


def test_compat_paper_keeps_the_functional_dropout_at_work_in_tests():
    torch.manual_seed(0)
    questions = encoder()
    for made in (
        QuestionType(0, questions, compat="paper"),
        Qcr(6, questions, ANSWERS, CLOSED, fusion=Ban, compat="paper"),
    ):
        made.eval()
        asked, text, taken = questions(texts(4)), texts(4), torch.tensor([True, False, True, False])
        assert not torch.equal(*(made(objects(4), asked, text, taken).logits for _ in range(2)))
    with pytest.raises(UserError, match="compat is 'papers': say paper"):
        QuestionType(0, questions, compat="papers")


def test_padding_words_change_nothing_of_cross_attention():
    head = heads()["xattn"].eval()
    asked, seen = encoder()(texts(3)), objects(3)
    real = torch.tensor([[True, True, True, False, False]] * 3)
    logits, _, attention = head(seen, Asked(asked.states, real, asked.embedded), texts(3))
    other = asked.states.clone()
    other[:, 3:] = 100.0
    torch.testing.assert_close(head(seen, Asked(other, real, asked.embedded), texts(3)).logits, logits)
    assert (attention[..., 3:] == 0).all()
    none = head(seen, Asked(asked.states, torch.zeros_like(real), asked.embedded), texts(3))
    assert none.logits.isfinite().all()


def test_cross_attention_looks_at_where_things_are():
    """Two images of the same patches in another order are the same to it (it has no positions of its own)..."""
    head = heads()["xattn"].eval()
    asked, seen = encoder()(texts(3)), objects(3, 4)
    logits, _, attention = head(seen, asked, texts(3))
    turned = head(seen.flip(1), asked, texts(3))
    torch.testing.assert_close(turned.logits, logits)
    torch.testing.assert_close(turned.attention.flip(2), attention)  # ...and the attention goes with the patches
    with pytest.raises(UserError, match=r"dim=7 must be a multiple of model\.head\.heads=2"):
        CrossAttention(6, encoder(), 3, dim=7, heads=2)


def test_a_question_type_has_two_answers():
    with pytest.raises(UserError, match="closed or open, but there are 3 answers"):
        QuestionType(0, encoder(), 3)

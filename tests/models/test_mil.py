"""Slide models: what their outputs mean, whose features they take, and that a checkpoint brings them back."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.special import expit, logit

from medclip.heads.abmil import Abmil
from medclip.heads.clam import Clam
from medclip.models.any import load_any
from medclip.models.mil import MilModel, build_mil, cumulative, outputs_of, probabilities
from medclip.types import Batch, UserError

HEAD = partial(Abmil, hidden=8, attention=4)


def model_of(classes: list[str], target: Any = "classes", **options: Any) -> MilModel:
    torch.manual_seed(0)
    return MilModel(**{"head": HEAD, "dim": 6, "classes": classes, "target": target} | options).eval()


def batch_of(label: torch.Tensor | None = None) -> Batch:
    bag = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    batch: Batch = {"bag": bag, "real": torch.ones(2, 5, dtype=torch.bool), "key": ["a", "b"]}
    return batch if label is None else {**batch, "label": label}


def saved(path: Path, model: MilModel, **changes: object) -> Path:
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"medclip": model.description, "state_dict": state} | changes, path)
    return path


def test_classes_and_findings() -> None:
    for target, function in (("classes", lambda z: z.softmax(1)), ("multilabel", torch.sigmoid)):
        model = model_of(["a", "b", "c"], target)
        out, found = model(batch_of()), model.predict(batch_of()["bag"])  # pyright: ignore
        torch.testing.assert_close(found.scores, function(out.logits))
        assert torch.equal(out.attention, found.attention) and found.slide.shape == (2, 8)


def test_grades_are_products_of_the_chances_to_go_on() -> None:
    z = torch.tensor([[0.3, -1.2, 2.0], [4.0, 0.0, -0.5]], dtype=torch.float64)
    above = expit(z.numpy()).cumprod(1)
    torch.testing.assert_close(cumulative(z), torch.from_numpy(logit(above)))
    found = probabilities(cumulative(z), "ordinal")
    for row, chances in zip(found, above, strict=True):
        expected = [1 - chances[0], chances[0] - chances[1], chances[1] - chances[2], chances[2]]
        torch.testing.assert_close(row, torch.tensor(expected).double())
    assert torch.equal(cumulative(z[:, :1]), z[:, :1])  # two grades: a plain logit


def test_grades_keep_their_order_and_gradients_at_every_extreme() -> None:
    z = torch.tensor([[a, b, c] for a in (-200.0, 0.0, 200.0) for b in (-200.0, 0.0, 200.0) for c in (-99.0, 99.0)])
    z.requires_grad_()
    found = cumulative(z)
    assert found.isfinite().all() and (found.diff(dim=1) <= 1e-5).all()
    assert (probabilities(found, "ordinal") >= 0).all()
    torch.nn.functional.binary_cross_entropy_with_logits(found, torch.ones_like(found)).backward()
    assert z.grad is not None and z.grad.isfinite().all()


def test_the_risk_of_hazards_is_the_expected_time_turned_round() -> None:
    z = torch.tensor([[0.5, -1.0, 0.0]], dtype=torch.float64)
    h = expit(z.numpy())[0]
    survival = [1 - h[0], (1 - h[0]) * (1 - h[1]), (1 - h[0]) * (1 - h[1]) * (1 - h[2])]
    assert probabilities(z, "survival").item() == pytest.approx(-sum(survival))
    early, late = torch.tensor([[5.0, -5.0, -5.0]]), torch.tensor([[-5.0, -5.0, 5.0]])
    assert probabilities(early, "survival") > probabilities(late, "survival")
    assert torch.equal(probabilities(torch.tensor([[0.7], [-2.0]]), "survival"), torch.tensor([0.7, -2.0]))  # Cox


def test_how_many_outputs_a_target_has() -> None:
    names = ["a", "b", "c"]
    counts = {target: outputs_of(target, names) for target in ("classes", "multilabel", "ordinal", "survival")}
    assert counts == {"classes": 3, "multilabel": 3, "ordinal": 2, "survival": 3}
    assert outputs_of("survival", []) == 1  # Cox
    for target, classes, line in (
        ("grades", names, "model.target=grades is unknown: one of classes, ordinal, multilabel, survival"),
        ("classes", ["a"], "needs at least 2 classes, but model.classes has 1"),
        ("multilabel", ["a", "a"], "names one twice"),
    ):
        with pytest.raises(UserError, match=line):
            outputs_of(target, classes)


def test_the_head_is_taught_by_labels_but_not_by_the_bins_of_times() -> None:
    head = partial(Clam, k_sample=2)
    label = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert (model_of(["a", "b"], head=head)(batch_of(label)).extra > 0).all()
    assert (model_of(["early", "late"], "survival", head=head)(batch_of(label)).extra == 0).all()
    with pytest.raises(UserError, match=r"2 labels a bag, the model 3 outputs.*model\.classes must be \$\{data"):
        model_of(["a", "b", "c"])(batch_of(label))


def test_features_of_another_model_are_refused() -> None:
    model = model_of(["a", "b"], encoder="uni")
    with pytest.raises(UserError, match=r"x\.h5 have 7 numbers a patch, the slide model 6: .* trained on \(uni\)"):
        model.refuse(7, "uni", "x.h5")
    with pytest.raises(UserError, match="made by encoder 'conch', but the slide model was trained on 'uni'"):
        model.refuse(6, "conch")
    model.refuse(6, "uni")
    model.refuse(6, None)
    with pytest.raises(UserError, match="7 numbers a patch"):
        model.predict(torch.zeros(1, 3, 7))
    with pytest.raises(UserError, match="say data=bags"):
        model({"key": []})


def test_padding_is_not_seen_by_predict() -> None:
    model, bag = model_of(["a", "b"]), batch_of()["bag"]  # pyright: ignore
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    padded = model.predict(bag, real)
    torch.testing.assert_close(padded.scores[1:], model.predict(bag[1:, :3]).scores)


@pytest.mark.parametrize("target", ["classes", "ordinal", "survival"])
def test_a_checkpoint_comes_back(tmp_path: Path, target: str) -> None:
    model = model_of(["a", "b", "c"], target, head=partial(Clam, branches="each", size="big"), encoder="uni")
    path = saved(tmp_path / "best.ckpt", model)
    back = load_any(pretrained=str(path)).eval()
    assert isinstance(back, MilModel) and back.description == model.description and back.encoder == "uni"
    bag = batch_of()["bag"]  # pyright: ignore
    for ours, theirs in zip(back.predict(bag), model.predict(bag), strict=True):
        assert torch.equal(ours, theirs)
    fresh = load_any(pretrained=f"random:{path}", seed=1).eval()
    assert isinstance(fresh, MilModel) and not torch.equal(fresh.predict(bag).scores, model.predict(bag).scores)


def test_a_new_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    model = model_of(["a", "b"], encoder="uni")
    path = saved(tmp_path / "best.ckpt", model)
    same: dict[str, Any] = {"head": HEAD, "dim": 6, "classes": ["c", "d"], "init": str(path)}
    bag = batch_of()["bag"]  # pyright: ignore
    assert torch.equal(build_mil(**same).eval().predict(bag).scores, model.predict(bag).scores)
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"dim": 7}, "features of 6 numbers by uni, these are of 7 by uni"),
        ({"encoder": "conch"}, "of 6 numbers by uni, these are of 6 by conch"),
        ({"classes": ["a", "b", "c"]}, r"instead of \(3, 8\)"),
        ({"init": str(saved(tmp_path / "clip.ckpt", model, medclip={"kind": "vqa"}))}, "is no slide model"),
    ]
    for wrong, line in wrongs:
        with pytest.raises(UserError, match=line):
            build_mil(**same | wrong)


def test_a_broken_description_is_one_line(tmp_path: Path) -> None:
    model = model_of(["a", "b"])
    about = {key: value for key, value in model.description.items() if key != "dim"}
    with pytest.raises(UserError, match="does not describe its slide model"):
        load_any(pretrained=str(saved(tmp_path / "a.ckpt", model, medclip=about)))
    evil = model.description | {"head": {"part": "heads.abmil.os"}}
    with pytest.raises(UserError, match="names a part"):
        load_any(pretrained=str(saved(tmp_path / "b.ckpt", model, medclip=evil)))


def test_a_model_learns_which_slides_hold_the_rare_patch() -> None:
    """One patch of 40 decides. The mean drowns it, attention finds it."""
    generator = torch.Generator().manual_seed(1)
    bags = torch.randn(64, 40, 6, generator=generator)
    label = torch.arange(64) % 2
    bags[label == 1, 7] += torch.tensor([4.0, -4.0, 0, 0, 0, 0])
    model = model_of(["no", "yes"]).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    batch: Batch = {"bag": bags, "real": torch.ones(64, 40, dtype=torch.bool)}
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch).logits, label).backward()
        optimizer.step()
    found = model.eval().predict(bags)
    assert (found.scores.argmax(1) == label).float().mean() > 0.95
    assert (found.attention[label == 1, 0].argmax(1) == 7).float().mean() > 0.9
    assert math.isclose(found.scores.sum().item(), 64, rel_tol=1e-5)

"""Meta-learning: the inner loop against finite differences and hand formulas, the steps and what they leave behind."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import Tensor, nn

from medclip.config import CONF
from medclip.losses.classes import ClassesLoss
from medclip.models.maml import Maml
from medclip.optim.schedule import warmup_cosine
from medclip.phantoms.generate import generate
from medclip.tasks.maml import MamlTask, adapt
from medclip.train import train
from medclip.types import Batch, UserError


def quadratic(n: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=dice, dtype=torch.float64)
    shift, target, theta = torch.randn(3, n, generator=dice, dtype=torch.float64)
    return root @ root.T, shift, target, theta


@pytest.mark.parametrize("first_order", [False, True])
def test_on_a_line_both_orders_are_their_hand_formulas(first_order: bool) -> None:
    # L_s(t) = a/2 (t - s)^2, so phi = s + (1 - lr a)^K (t - s); L_q(phi) = phi^2 / 2 + phi.
    a, s, lr, steps = 3.0, 0.7, 0.1, 3
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    found = adapt(lambda p: a / 2 * (p["t"] - s) ** 2, {"t": theta}, steps=steps, lr=lr, first_order=first_order)
    phi = s + (1 - lr * a) ** steps * (2.0 - s)
    assert float(found["t"].detach()) == pytest.approx(phi, abs=1e-12)
    (grad,) = torch.autograd.grad(found["t"] ** 2 / 2 + found["t"], theta)
    through = 1.0 if first_order else (1 - lr * a) ** steps
    assert float(grad) == pytest.approx((phi + 1) * through, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 4])
def test_on_a_quadratic_the_gradient_is_that_of_finite_differences(steps: int) -> None:
    matrix, shift, target, theta = quadratic()
    lr = 0.05

    def meta(start: Tensor) -> Tensor:
        def inner(p: Any) -> Tensor:
            return p["t"] @ matrix @ p["t"] / 2 - shift @ p["t"]

        return ((adapt(inner, {"t": start}, steps=steps, lr=lr)["t"] - target) ** 2).sum()

    start = theta.requires_grad_()
    (grad,) = torch.autograd.grad(meta(start), start)
    eps = 1e-6
    differences = [
        (meta(start + eps * unit) - meta(start - eps * unit)) / (2 * eps) for unit in torch.eye(4, dtype=torch.float64)
    ]
    torch.testing.assert_close(grad, torch.stack(differences).detach(), rtol=1e-7, atol=1e-7)
    # And by hand: phi = M theta + const with M = (I - lr A)^K.
    power = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - lr * matrix, steps)
    phi = adapt(lambda p: p["t"] @ matrix @ p["t"] / 2 - shift @ p["t"], {"t": start}, steps=steps, lr=lr)["t"]
    torch.testing.assert_close(grad, 2 * power.T @ (phi - target).detach())


class Small(nn.Module):
    """A tiny smooth net with the face of `Maml`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.description = {"ways": 2}

    def prepare(self, image: Tensor) -> Tensor:
        return image.double()

    def forward(self, batch: Batch) -> Tensor:
        return self.net(batch["image"])  # pyright: ignore


def task_of(model: nn.Module, **options: Any) -> MamlTask:
    options = {"shots": 2, "queries": 3, "inner_steps": 2, "inner_lr": 0.3, **options}
    optimizer: Any = lambda named: torch.optim.SGD([p for _, p in named], lr=0.1)  # noqa: E731
    return MamlTask(model, {"classes": ClassesLoss()}, optimizer, partial(warmup_cosine, warmup=0), **options)


def episode(seed: int = 0, ways: int = 2, each: int = 5) -> Tensor:
    return torch.randn(ways, each, 1, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_on_a_net_with_a_batch_norm_too() -> None:
    model, images = Small(), episode()
    task = task_of(model)
    task.play(images, 2)[0].backward()
    eps = 1e-6
    for name, p in model.named_parameters():
        flat, grad = p.data.view(-1), p.grad
        assert grad is not None
        for i in range(0, flat.numel(), 3):
            before = float(flat[i])
            values = []
            for step in (eps, -eps):
                flat[i] = before + step
                values.append(float(task.play(images, 2, learn=False)[0]))
            flat[i] = before
            difference = (values[0] - values[1]) / (2 * eps)
            assert float(grad.view(-1)[i]) == pytest.approx(difference, abs=1e-6), name


def test_orders_differ_but_where_there_is_no_step() -> None:
    grads: dict[tuple[bool, int], Tensor] = {}
    for first_order in (False, True):
        for steps in (0, 2):
            model = Small()
            task_of(model, first_order=first_order).play(episode(), steps)[0].backward()
            grads[first_order, steps] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.equal(grads[False, 0], grads[True, 0])
    assert not torch.allclose(grads[False, 2], grads[True, 2], rtol=1e-2)


def test_a_test_leaves_no_trace_and_training_counts_in_the_running_statistics() -> None:
    model = Small().eval()
    task = task_of(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, _ = task.play(episode(), 2, learn=False)
    again, _ = task.play(episode(), 2, learn=False)
    assert torch.equal(first, again) and not first.requires_grad and not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    task.play(episode(), 2)
    norm: Any = model.net[2]
    assert int(norm.num_batches_tracked) == 3  # two inner steps and the queries
    assert not torch.equal(norm.running_mean, before["net.2.running_mean"])


def batch_of(count: int, labels: list[int]) -> Batch:
    eye = torch.eye(4)
    return {
        "image": torch.randint(0, 256, (len(labels), 3, 96, 96), dtype=torch.uint8),
        "label": eye[labels],
        "key": [str(i) for i in range(count)],
    }


def test_only_whole_episodes_are_taken() -> None:
    task = task_of(Maml(2), shots=1, queries=2)
    right = [0, 0, 0, 2, 2, 2, 3, 3, 3, 1, 1, 1]
    (one, two) = task.episodes(batch_of(12, right))
    assert one.shape == two.shape == (2, 3, 1, 84, 84)
    assert len(task.episodes(batch_of(6, right))) == 1  # what follows is padding
    assert task.episodes(batch_of(0, right)) == []
    for labels in ([0, 0, 1, 2, 2, 2], [2, 2, 2, 2, 2, 2]):
        with pytest.raises(UserError, match="no such episodes"):
            task.episodes(batch_of(6, labels))
    with pytest.raises(UserError, match="say data=episodes"):
        task.episodes(batch_of(5, right))


@pytest.mark.parametrize(("key", "value"), [("shots", 0), ("inner_steps", 0), ("inner_lr", 0.0)])
def test_settings_without_a_meaning_are_refused(key: str, value: float) -> None:
    with pytest.raises(UserError, match=key):
        task_of(Small(), **{key: value})


CLASSES = ["necrosis", "smooth muscle", "adenocarcinoma", "lymphoid tissue"]


def pictures(folder: Path, name: str, count: int, seed: int) -> str:
    """A table of those of `count` generated pictures that are of CLASSES; drawn once, where a source draws anew."""
    rows = []
    for i, phantom in enumerate(generate("histology", seed, range(count), 96)):
        if phantom.label in CLASSES:
            Image.fromarray(phantom.image).save(folder / f"{name}{i}.png")
            rows.append(json.dumps({"image": f"{name}{i}.png", "label": phantom.label}))
    (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return f"[{{table: {folder}/{name}.jsonl}}]"


def run(output: Path, *words: str) -> Any:
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "train",
            [
                *("experiment=medvqa_maml", "trainer=cpu", "data.workers=0", "model.image_size=96"),
                *("data.ways=2", "data.shots=3", "data.queries=3", "data.val_episodes=30", "data.batch_size=2"),
                *("task.inner_steps=2", "task.val_steps=3", "task.inner_lr=0.05", "optim.lr=3e-3"),
                f"output={output}",
                *words,
            ],
        )
    return train(cfg)


@pytest.mark.slow
def test_from_what_it_learned_one_step_goes_further_than_from_random_weights(tmp_path: Path) -> None:
    """On images that it has not seen. That it beats chance would say nothing: after a step a random net does too."""
    words = [
        "data.sources=" + pictures(tmp_path, "train", 240, seed=0),
        "data.val_sources=" + pictures(tmp_path, "new", 120, seed=1),
        f"data.labels={{names: {json.dumps(CLASSES)}}}",
        *("epochs=1", "data.batch_size=4", "data.shots=1", "data.val_episodes=60"),
        *("task.inner_steps=1", "task.val_steps=1", "optim.lr=1e-3"),
    ]
    learned = run(tmp_path / "learned", *words, "data.episodes=160").callback_metrics
    random = run(tmp_path / "random", *words, "data.episodes=4", "optim.lr=1e-12").callback_metrics
    assert all(0.35 < metrics["val/before"] < 0.65 for metrics in (learned, random))  # of two classes
    assert learned["val/loss"] < 0.8 * random["val/loss"]
    assert learned["val/accuracy"] > random["val/accuracy"] + 0.05


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    source = "[{phantoms: {kind: questions, samples: 64, size: 64, seed: %d}}]"
    short = [f"data.{part}={source % i}" for i, part in enumerate(("sources", "val_sources"))]
    short += ["data.labels={names: [disc, square, triangle], field: phantom.attributes.shape}"]
    short += ["data.episodes=6", "data.val_episodes=2", "epochs=2", "task.inner_steps=1", "data.shots=1"]
    short += ["callbacks.checkpoint.every_n_steps=1"]
    whole = run(tmp_path / "whole", *short)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", *short, "+callbacks.die._target_=tests.tasks.test_runs.Killed")
    assert (tmp_path / "parts" / "checkpoints" / "last.ckpt").is_file()
    parts = run(tmp_path / "parts", *short, "resume=auto")
    assert whole.global_step == parts.global_step == 6
    ours, theirs = (t.lightning_module.model.state_dict() for t in (whole, parts))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())

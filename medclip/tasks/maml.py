"""Model-agnostic meta-learning: weights from which a few steps on a few samples go a long way.

Finn et al. 2017, arXiv:1703.03400, algorithm 2; as MEVF (arXiv:1909.11867) prepares its net. An episode has some
classes, with `shots` samples of each to adapt to and `queries` to be judged by. With L_s and L_q the losses on the two,
alpha the inner rate and theta the weights:

    phi_0 = theta,   phi_{k+1} = phi_k - alpha * grad L_s(phi_k),   loss = mean over episodes of L_q(phi_K)

whose gradient by theta goes through the inner steps (second order). `first_order` takes grad L_s as a constant, which
saves memory and half of the time, and mostly loses little (section 5.2 there).

The batch norms see the statistics of the shots or queries that they normalise, in tests too, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call  # pyright: ignore[reportPrivateImportUsage]

from medclip.tasks.base import Task, real_rows
from medclip.tasks.gather import count_real
from medclip.tasks.seed import seed_step
from medclip.types import Batch, UserError

Parameters = Mapping[str, Tensor]


def adapt(
    loss: Callable[[Parameters], Float[Tensor, ""]],
    parameters: Parameters,
    *,
    steps: int,
    lr: float,
    first_order: bool = False,
) -> dict[str, Tensor]:
    """The inner loop: `steps` steps of gradient descent, which the result can be differentiated through.

    Args:
        loss: of parameters.
        parameters: to start from, by name.
        steps: how many.
        lr: rate of each.
        first_order: the steps' gradients count as constants.
    """
    found = dict(parameters)
    for _ in range(steps):
        grads = torch.autograd.grad(loss(found), list(found.values()), create_graph=not first_order)
        found = {name: value - lr * grad for (name, value), grad in zip(found.items(), grads, strict=True)}
    return found


class MamlTask(Task):
    """One step of it; see `Task` for the other options.

    The model is a module `Batch -> logits (b, ways)`, with `.prepare(image)` for what is looked at several times. A
    batch holds whole episodes one after another, class by class, the shots first (data=episodes). Validation logs
    `val/loss`, `val/accuracy` of the queries after the inner steps, by which the best checkpoint is chosen, and
    `val/before` without any.

    Args:
        shots: samples of each class to adapt to.
        queries: samples of each class to be judged by.
        inner_steps: of gradient descent.
        inner_lr: rate of these.
        val_steps: inner steps in validation; None: as many.
        first_order: see `adapt`.
    """

    def __init__(
        self,
        *args: Any,
        shots: int,
        queries: int,
        inner_steps: int = 5,
        inner_lr: float = 0.01,
        val_steps: int | None = None,
        first_order: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.ways = int(self.model.description["ways"])  # pyright: ignore
        counts = {"shots": shots, "queries": queries, "inner_steps": inner_steps, "val_steps": val_steps or inner_steps}
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"task.{name} is {value}: give 1 or more")
        if inner_lr <= 0:
            raise UserError(f"task.inner_lr is {inner_lr}: give a rate above 0")
        self.shots, self.queries = shots, queries
        self.inner_steps, self.inner_lr = inner_steps, inner_lr
        self.val_steps = val_steps or inner_steps
        self.first_order = first_order

    @property
    def rows(self) -> int:
        """Of an episode."""
        return self.ways * (self.shots + self.queries)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        seed_step(self.seed, self.current_epoch, batch_idx, self.global_rank)
        episodes = self.episodes(batch)
        counts = count_real(len(episodes), self.device)
        if not episodes:  # a zero that keeps the graph keeps DDP in step
            return sum((p.sum() for p in self.model.parameters()), torch.zeros((), device=self.device)) * 0
        results = [self.play(images, self.inner_steps) for images in episodes]
        totals, right = (torch.stack(values).mean() for values in zip(*results, strict=True))
        rate = max(group["lr"] for group in self.optimizers(use_pl_optimizer=False).param_groups)  # pyright: ignore
        values = {"train/loss": totals.detach(), "train/accuracy": right, "train/lr": rate}
        self.log_dict(values, batch_size=len(episodes))
        # DDP takes the mean over ranks, and the last batch of an epoch has fewer episodes on some.
        return totals * (len(episodes) * len(counts) / max(1, sum(counts)))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        sums = torch.zeros(4, device=self.device)
        # Validation runs without gradients, which the inner loop needs.
        with torch.inference_mode(False), torch.enable_grad():
            for images in self.episodes(batch):
                total, right = self.play(images, self.val_steps, learn=False)
                before = self.play(images, 0, learn=False)[1]
                sums += torch.stack([total.detach(), right, before, torch.ones_like(right)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        count = int(sums[3])
        if count:
            names = ("val/loss", "val/accuracy", "val/before")
            self.log_dict(dict(zip(names, sums[:3] / count, strict=True)), batch_size=count)

    def episodes(self, batch: Batch) -> list[Float[Tensor, "ways samples ..."]]:
        """The images of the batch's whole episodes, as the model looks at them.

        Raises:
            UserError: the batch holds none.
        """
        count, label = real_rows(batch) // self.rows, batch.get("label")
        if not real_rows(batch):
            return []
        if label is None or real_rows(batch) % self.rows:
            raise UserError("the data have no episodes: say data=episodes, with data.labels")
        shape = (count, self.ways, self.shots + self.queries)
        classes = label[: count * self.rows].unflatten(0, shape)
        other = (classes[:, :, None, 0] != classes[:, None, :, 0]).any(-1)
        apart = torch.eye(self.ways, dtype=torch.bool, device=label.device).logical_not()
        if not (torch.equal(classes, classes[:, :, :1].expand_as(classes)) and bool((other | ~apart).all())):
            raise UserError("the data have no such episodes: say data=episodes, with the task's shots and queries")
        image = batch["image"][: count * self.rows]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        prepare: Any = self.model.prepare
        return list(prepare(image).unflatten(0, shape))

    def play(
        self, images: Float[Tensor, "ways samples ..."], steps: int, *, learn: bool = True
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """One episode: the loss on its queries after `steps` inner steps, and the share of them that are right.

        Args:
            images: shots, then queries, of each class.
            steps: inner ones.
            learn: keep the way to the weights, and let the batch norms count what they see.
        """
        shots, queries = (part.flatten(0, 1) for part in images.split([self.shots, self.queries], 1))
        labels = torch.eye(self.ways, device=images.device)
        near, far = (labels.repeat_interleave(n, 0) for n in (self.shots, self.queries))
        model = self.model
        # A test leaves no trace in the running statistics, but needs those of its own samples.
        buffers = {} if learn else {name: value.clone() for name, value in model.named_buffers()}
        mode = model.training

        def look(parameters: Parameters, image: Tensor) -> Tensor:
            return functional_call(model, {**buffers, **parameters}, ({"image": image},))

        def miss(parameters: Parameters) -> Tensor:
            return self.weigh(look(parameters, shots), {"label": near})[1]

        start = {name: p for name, p in model.named_parameters() if p.requires_grad}
        model.train()
        try:
            first_order = self.first_order or not learn
            adapted = adapt(miss, start, steps=steps, lr=self.inner_lr, first_order=first_order)
            with torch.set_grad_enabled(learn):
                logits = look(adapted, queries)
        finally:
            model.train(mode)
        right = (logits.argmax(1) == far.argmax(1)).float().mean()
        return self.weigh(logits, {"label": far})[1], right.detach()

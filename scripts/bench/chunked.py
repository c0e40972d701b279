"""Chunked contrastive steps at an eighth of the batch: memory and time of the whole batch at once over ours.

    scripts/bench/chunked.py [--quick]

Both sides take the same step, forward and backward of InfoNCE, of a CLIP with a ViT-S/16 at 112 pixels and a small text
tower, on one thread in float32; their losses and gradients must agree to 1e-5. Memory is what torch's allocator hands
out during the step, as its profiler saw it: the highest sum of what is alive, less the parameters' gradients themselves
(both sides keep them, as both would Adam's moments); chunks' features, copies and temporaries count. The peak with the
gradients is told beside it. The issue's aims: memory at least 5, time at least 0.83 (1.2 x the time of the whole batch;
a second forward pass of seven eighths costs 1.29 x where a backward pass costs two forward ones).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch
from _timing import Cost, arguments, interleave, measure, report
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from medclip.losses.clip import clip_loss
from medclip.models.chunked import chunked
from medclip.models.clip import Clip
from medclip.models.load import load_clip
from medclip.types import Batch

SHARE = 8
PEER = "whole-batch"
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 384,
    "vision_cfg": {"image_size": 112, "layers": 12, "width": 384, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 4096, "width": 256, "heads": 4, "layers": 4},
}


def build() -> Clip:
    torch.manual_seed(0)
    return load_clip(ARCHITECTURE).train()


def make_batch(rows: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (rows, 3, 112, 112), dtype=torch.uint8, generator=generator)
    return Batch(image=image, text=torch.randint(1, 4096, (rows, 32), generator=generator))


def step(model: Clip, batch: Batch) -> float:
    model.zero_grad()
    loss = clip_loss(model(batch))
    loss.backward()
    return loss.item()


def peaks(model: Clip, batch: Batch) -> tuple[int, int]:
    """Bytes at the highest point of a step: without the parameters' gradients, and with them."""
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, batch)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    found = sorted(events(tree), key=lambda event: event.start_time_ns)
    found = [event.extra_fields for event in found if event.tag == _EventType.Allocation]
    kept = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    made = {it.ptr: number for number, it in enumerate(found) if it.alloc_size > 0 and it.ptr in kept}  # the last there
    if made.keys() != kept:
        sys.exit("chunked: the profiler did not see where the gradients were made")
    gradients, alive, most, most_with = set(made.values()), 0, 0, 0
    held = 0
    for number, it in enumerate(found):
        if number in gradients:
            held += it.alloc_size
        else:
            alive += it.alloc_size
        most, most_with = max(most, alive), max(most_with, alive + held)
    return most, most_with


def events(tree: Any) -> Iterator[Any]:
    for event in tree:
        yield event
        yield from events(event.children)


def check(whole: Clip, ours: Clip, batch: Batch) -> None:
    """Stop where the two do not do the same."""
    losses = [step(model, batch) for model in (whole, ours)]
    pairs = list(zip(whole.parameters(), ours.parameters(), strict=True))
    norm = statistics.mean(p.grad.norm().item() for p, _ in pairs if p.grad is not None)
    errors = [(p.grad - q.grad).norm().item() / norm for p, q in pairs if p.grad is not None and q.grad is not None]
    if abs(losses[0] - losses[1]) > 1e-5 or max(errors) > 1e-5 or len(errors) != len(pairs):
        sys.exit(f"chunked: losses {losses}, gradients differ by up to {max(errors):.1e}: they do not compare")
    print(f"loss {losses[0]:.7f} and {losses[1]:.7f}; gradients differ by at most {max(errors):.1e} of their norm")


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(1)
    rows, steps, runs = (32, 1, 3) if args.quick else (128, 2, 5)
    batch = make_batch(rows)
    whole, ours = build(), chunked(build(), rows // SHARE)
    check(whole, ours, batch)
    print(f"batch {rows}, chunks of {rows // SHARE}")
    (peer, peer_with), (mine, mine_with) = peaks(whole, batch), peaks(ours, batch)
    mib = 2**20
    print(f"  activations at most {mine / mib:.0f} MiB, {PEER} {peer / mib:.0f} MiB")
    print(f"  with gradients      {mine_with / mib:.0f} MiB, {PEER} {peer_with / mib:.0f} MiB")

    def run(model: Clip) -> Cost:
        return measure(lambda: sum(1 for _ in range(steps) if step(model, batch)))

    pairs = interleave(lambda: run(ours), lambda: run(whole), runs=runs)
    ratio = peer / mine  # the allocator's sums are the same in every run
    print(f"chunked_memory ratio={ratio:.3f} min={ratio:.3f} max={ratio:.3f} peer={PEER}")
    report("chunked_time", pairs, unit="step", peer=PEER)


if __name__ == "__main__":
    main()

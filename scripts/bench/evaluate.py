"""Zero-shot evaluation: images per CPU-second, ours over CLIP_benchmark 1.6.2, same images, same model, same accuracy.

    scripts/bench/evaluate.py [--quick]

Both sides classify the same JPEGs of 512 to 1024 px in class folders, by four classes of six prompts, in batches of 64,
on one thread without workers. Ours is what `medclip evaluate` does for a checkpoint: its own reader with
`data.exact=false` (JPEGs decoded at 1/2 or 1/4 where that leaves pixels enough), thumbnails, scores by prompt, every
metric and table. The peer is CLIP_benchmark's own classifier and loop (`zeroshot_classification`) on a torch DataLoader
with open_clip's transform, as its command line builds it; it is installed for this alone, into .venv, when needed. By
default it runs the towers in bfloat16, and so do both sides, each with float32 beside it.

Two models, since the answer depends on the tower: a very small one, which leaves the reader's cost, and ViT-B/32. Their
weights are random but for the last projection, which is solved by least squares so that accuracy means something. In
float32 with `exact` every prediction must be the peer's; with the fast decoder accuracy may differ by 1 %.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from _timing import arguments, interleave, measure, ratios, report, table
from loader import _fields, _jpeg

sys.path.remove(str(Path(__file__).resolve().parent))  # where slides.py is a benchmark, and not the package
from medclip.data.evalset import EvalSet
from medclip.evals.classification import ClassificationOutcomes
from medclip.evals.run import evaluate_checkpoint
from medclip.evals.zeroshot import ZeroShotClassification
from medclip.infer.zeroshot import ensemble, prompt_features
from medclip.models.clip import Clip
from medclip.models.load import load_clip

VENV = Path(__file__).resolve().parents[2] / ".venv"
PEER = VENV / "bench-clip-benchmark"
PACKAGE = "clip-benchmark==1.6.2"
BATCH = 64
STAINS = {
    "adenocarcinoma": (1.0, 0.7, 0.9),
    "lymphoid tissue": (0.7, 0.7, 1.0),
    "muscle": (1.0, 0.75, 0.65),
    "fat": (1.0, 1.0, 0.8),
}
TEMPLATES = [f"{start} {{c}}{end}" for start in ("a photo of", "an image of", "view of") for end in (".", " tissue")]
SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 64, "layers": 1, "head_width": 32},
    "text_cfg": {"width": 64, "heads": 2, "layers": 1},
}
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Found:
    """What a side says of the images."""

    accuracy: float
    predicted: np.ndarray


def write_images(folder: Path, count: int) -> None:
    """`count` pictures, as the loader's benchmark draws them, each in the colours of its class."""
    import cv2

    rng = np.random.default_rng(0)
    fields = _fields(rng)
    for i in range(count):
        label, tint = list(STAINS.items())[i % len(STAINS)]
        picture = cv2.imdecode(np.frombuffer(_jpeg(rng, fields), np.uint8), cv2.IMREAD_COLOR)
        assert picture is not None
        shaded = np.clip(picture * (np.array(tint[::-1]) + 0.03 * rng.standard_normal(3)), 0, 255).astype(np.uint8)
        (folder / label).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / label / f"{i:05d}.jpg"), shaded, [cv2.IMWRITE_JPEG_QUALITY, 80])


@torch.inference_mode()
def solve(clip: Clip, folder: Path) -> None:
    """Set the image tower's projection so that images come near the prompts of their class (ridge regression)."""
    visual: Any = clip.net.visual
    classes = {label: [label] for label in STAINS}
    targets = ensemble(prompt_features(clip, classes, TEMPLATES))
    targets = targets - targets.mean(dim=0)
    projection, visual.proj = visual.proj, None
    pooled, labels = [], []
    for batch in EvalSet([{"folder": str(folder), "caption": False}], label="label").batches(clip.preprocess, BATCH):
        assert "image" in batch and "key" in batch and "meta" in batch
        pooled.append(visual(clip.normalise(batch["image"][: len(batch["key"])])))
        labels += [list(STAINS).index(own["label"]) for own in batch["meta"]]
    x, y = torch.cat(pooled).double(), targets[labels].double()
    ridge = 1e-4 * x.square().sum() / x.shape[1] * torch.eye(x.shape[1], dtype=torch.double)
    visual.proj = projection
    projection.copy_(torch.linalg.solve(x.T @ x + ridge, x.T @ y).float())


def ours(clip: Clip, folder: Path, precision: Precision, exact: bool, workers: int = 0) -> Found:
    data = EvalSet([{"folder": str(folder), "caption": False}], label="label", exact=exact)
    classes = {label: label for label in sorted(STAINS)}
    evaluation = ZeroShotClassification(data, name="bench", classes=classes, templates=TEMPLATES)
    result = evaluate_checkpoint(clip, {"bench": evaluation}, batch_size=BATCH, workers=workers, precision=precision)
    outcomes = result["bench"].outcomes
    assert isinstance(outcomes, ClassificationOutcomes)
    return Found(result["bench"].metrics["acc1"], outcomes.logits.argmax(axis=1))


def peer(clip: Clip, folder: Path, precision: Precision, workers: int = 0) -> Found:
    """`clip_benchmark eval` without its metrics, of which one fails with this numpy."""
    import open_clip
    from clip_benchmark.metrics import zeroshot_classification as z  # pyright: ignore[reportMissingImports]
    from torchvision.datasets import ImageFolder

    size, mean, std = clip.preprocess.size, clip.preprocess.mean, clip.preprocess.std
    transform: Any = open_clip.image_transform(size, is_train=False, mean=mean, std=std)
    dataset = ImageFolder(str(folder), transform=transform)
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=False, num_workers=workers)
    amp, tokenizer = precision == "bf16", open_clip.get_tokenizer("ViT-B-32")
    prompts = z.zero_shot_classifier(clip.net, tokenizer, dataset.classes, TEMPLATES, "cpu", amp)
    logits, target = z.run_classification(clip.net, prompts, loader, "cpu", amp)
    predicted = logits.argmax(dim=1)
    return Found(float((predicted == target).float().mean()), predicted.numpy())


def install_peer() -> None:
    """CLIP_benchmark without what it depends on, which is here already as far as its classification needs it."""
    if not PEER.is_dir():
        with tempfile.TemporaryDirectory(dir=VENV) as folder:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
                sys.exit(f"evaluate: cannot install the peer ({PACKAGE}; is there a network?): {why}")
            Path(folder).rename(PEER)
            Path(folder).mkdir()  # for its manager to remove
    sys.path.append(str(PEER))


def check(name: str, clip: Clip, folder: Path) -> None:
    """Stop where the two sides do not say the same."""
    theirs = {precision: peer(clip, folder, precision) for precision in ("fp32", "bf16")}
    exact = ours(clip, folder, "fp32", True)
    same = float((exact.predicted == theirs["fp32"].predicted).mean())
    line = f"{name}: accuracy of the peer {theirs['fp32'].accuracy:.4f}, in bfloat16 {theirs['bf16'].accuracy:.4f}"
    for precision in ("fp32", "bf16"):
        fast = ours(clip, folder, precision, False)
        agree = float((fast.predicted == theirs[precision].predicted).mean())
        line += f"; ours {precision} {fast.accuracy:.4f}, {100 * agree:.1f} % of predictions the same"
        if abs(fast.accuracy - theirs[precision].accuracy) > 0.01:
            sys.exit(f"evaluate: {line}: the accuracies differ, so the speeds do not compare")
    print(f"{line}; exact float32 {exact.accuracy:.4f}, {100 * same:.1f} % the same", flush=True)
    if same < 1:
        sys.exit("evaluate: with exact pixels some predictions are not the peer's")


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(1)
    install_peer()
    count = 128 if args.quick else 512
    with tempfile.TemporaryDirectory() as temporary:
        folder, other = Path(temporary) / "images", Path(temporary) / "solve"
        few = Path(temporary) / "few"  # for the large tower, whose cost hides the reader's
        write_images(folder, count)
        write_images(few, 64)
        write_images(other, 128)
        print(f"{count} images, mean {np.mean([p.stat().st_size for p in folder.rglob('*.jpg')]) / 1000:.0f} kB")
        lines: dict[str, Callable[[], None]] = {}
        sides = (("small tower", SMALL, folder, 3 if args.quick else 5), ("ViT-B/32", "ViT-B-32", few, 3))
        for name, architecture, images, runs in sides:
            torch.manual_seed(0)
            clip = load_clip(architecture).eval()
            solve(clip, other)
            check(name, clip, images)
            settings: tuple[tuple[Precision, bool], ...] = (("fp32", False), ("fp32", True), ("bf16", False))
            for precision, exact in settings:

                def our(
                    clip: Clip = clip, images: Path = images, precision: Precision = precision, exact: bool = exact
                ) -> int:
                    return len(ours(clip, images, precision, exact).predicted)

                def their(clip: Clip = clip, images: Path = images, precision: Precision = precision) -> int:
                    return len(peer(clip, images, precision).predicted)

                pairs = interleave(lambda: measure(our), lambda: measure(their), runs=runs)
                title = f"{name}, {precision}, {'exact' if exact else 'fast'} decode"
                print(f"{title}\n{table(pairs, 'image', 'CLIP_benchmark')}", flush=True)
                print(f"  ratio {statistics.median(ratios(pairs)):.3f}", flush=True)
                lines[title] = lambda pairs=pairs: report("evaluate", pairs, unit="image", peer="CLIP_benchmark-1.6.2")
        lines["small tower, bf16, fast decode"]()


if __name__ == "__main__":
    main()

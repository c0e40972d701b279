"""One table of several towers that were trained under one recipe: what each costs, and what it reaches.

    python scripts/encoder_table.py runs/encoder_protocol --output runs/encoder_table \\
        eval=[zeroshot,retrieval] 'evals.zeroshot.data={sources: [{folder: test}], label: label}' \\
        'evals.retrieval.data.sources=[{urls: "test/*.tar"}]'

The protocol of ViTamin (arXiv:2404.02132). Words with `=` go to `medclip evaluate`, whose report and results.json lie
in the output folder as well; all towers are judged on the same samples, and compared with the first. A folder of a
sweep stands for all its runs. Written are `encoders.md` and `encoders.json`.

Parameters and MACs are of the image tower, its projection included. A MAC is one multiplication and addition in a
convolution or matrix product; what torch counts is twice that. Images a second are of the forward pass alone, the
median of some batches, on the evaluation's device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from medclip.config import CONF, atomic_write
from medclip.evaluate import evaluate, pick_device
from medclip.models.attention import plain_attention
from medclip.models.clip import Clip
from medclip.models.lineage import read_lineage
from medclip.models.load import load_clip
from medclip.types import UserError


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The runs in `folders`: each is one, or holds the numbered jobs of a sweep.

    Raises:
        UserError: a folder that holds no finished training.
    """
    runs: list[Path] = []
    for folder in folders:
        jobs = [folder] if (folder / "checkpoints").is_dir() else sorted(folder.glob("[0-9]*"), key=_number)
        found = [job for job in jobs if (job / "checkpoints" / "last.ckpt").is_file()]
        if not found:
            raise UserError(f"{folder} holds no run: no checkpoints/last.ckpt in it or in its numbered folders")
        runs += found
    return runs


def _number(path: Path) -> tuple[int, str]:
    return (int(path.name) if path.name.isdigit() else sys.maxsize, path.name)


def tower_name(model_cfg: Mapping[str, Any]) -> str:
    """What the image tower of an open_clip configuration is called."""
    vision = model_cfg["vision_cfg"]
    if name := vision.get("timm_model_name"):
        return str(name)
    size = vision.get("width", 768)
    layers = vision.get("layers", 12)
    if isinstance(layers, Sequence):
        return f"resnet_{'-'.join(map(str, layers))}_w{size}"
    return f"vit_p{vision.get('patch_size', 16)}_l{layers}_w{size}"


def macs(clip: Clip) -> int:
    """Multiply-adds of one image through the image tower."""
    image = torch.zeros((1, 3, *clip.preprocess.size), device=clip.device, dtype=clip.logit_scale.dtype)
    with plain_attention(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        clip.net.encode_image(image)
    return counter.get_total_flops() // 2


@torch.no_grad()
def images_a_second(clip: Clip, batch: int, repeats: int) -> float:
    """Median rate of the image tower on batches of uint8 images."""
    image = torch.zeros((batch, 3, *clip.preprocess.size), dtype=torch.uint8, device=clip.device)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        clip.encode_image(image)
        if clip.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return batch / statistics.median(seconds[1:])  # the first one warms up


def cost(run: Path, device: torch.device, batch: int, repeats: int) -> dict[str, Any]:
    """What the tower of a run is and costs."""
    path = str(run / "checkpoints" / "last.ckpt")
    clip = load_clip(pretrained=path, device=device).eval()
    seen = (read_lineage(path) or {}).get("seen") or {}
    return {
        "tower": tower_name(clip.description["model_cfg"]),
        "run": str(run),
        "parameters": sum(p.numel() for p in clip.net.visual.parameters()),
        "parameters_all": sum(p.numel() for p in clip.net.parameters()),
        "image_size": list(clip.preprocess.size),
        "macs": macs(clip),
        "images_per_second": images_a_second(clip, batch, repeats),
        "steps": seen.get("steps"),
        "samples_seen": seen.get("samples"),
    }


def named(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each row under a name of its own: the tower, with samples seen or the run's name where that is not enough."""
    for parts in (("tower",), ("tower", "samples_seen"), ("tower", "run")):
        names = ["@".join(str(row[part]) for part in parts) for row in rows]
        if max(Counter(names).values()) == 1:
            return dict(zip(names, rows, strict=True))
    raise UserError("the same run was given twice: name each once")


def results(output: Path, rows: Mapping[str, Mapping[str, Any]], words: Sequence[str]) -> list[dict[str, Any]]:
    """Evaluate all runs by `medclip evaluate`; its records.

    Raises:
        UserError: no evaluation, or what `evaluate` refuses.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", [*words, f"output={json.dumps(str(output))}"])
    checkpoints = {name: str(Path(row["run"]) / "checkpoints" / "last.ckpt") for name, row in rows.items()}
    OmegaConf.update(cfg, "checkpoints", checkpoints, merge=False, force_add=True)
    report = evaluate(cfg)
    found = json.loads((output / "results.json").read_text(encoding="utf-8"))
    shown = {c.name: [row.metric for row in c.headline] for c in report.comparisons.values()}
    return [record | {"headline": shown[record["dataset"]]} for record in found if record["dataset"] in shown]


def table(rows: Mapping[str, Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a row a tower."""
    columns = list(dict.fromkeys((str(r["dataset"]), str(metric)) for r in records for metric in r["headline"]))
    by = {(str(r["model"]), str(r["dataset"])): r for r in records}
    header = ["tower", "M params", "G MACs", "images/s", "samples seen", *(f"{d}: {m}" for d, m in columns)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, row in rows.items():
        seen = row["samples_seen"]
        cells = [name, f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.3f}", f"{row['images_per_second']:.0f}"]
        cells.append("?" if seen is None else f"{seen:,}")
        lines.append([*cells, *(_cell(by.get((name, dataset)), metric) for dataset, metric in columns)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(record: Mapping[str, Any] | None, metric: str) -> str:
    value = record["metrics"].get(metric) if record else None
    if record is None or value is None:
        return "–"
    low, high = record["intervals"][metric]
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="RUN | KEY=VALUE", help="runs or sweeps; words of medclip evaluate")
    parser.add_argument("--output", type=Path, default=Path("runs/encoder_table"), help="folder (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images at a time, for the speed (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="batches whose median is the speed (%(default)s)")
    chosen = parser.parse_intermixed_args(arguments)
    words = [word for word in chosen.words if "=" in word]
    try:
        runs = find_runs([Path(word) for word in chosen.words if "=" not in word])
        if not runs or not any(word.startswith("eval=") or word.startswith("suite=") for word in words):
            raise UserError("name runs, and evaluations: RUN… eval=[zeroshot,retrieval] …")
        asked = next((word.partition("=")[2] for word in words if word.startswith("device=")), "auto")
        rows = named([cost(run, pick_device(asked), chosen.batch, chosen.repeats) for run in runs])
        records = results(chosen.output, rows, words)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(f"encoder_table: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for record in records:
        own = {
            metric: {"value": record["metrics"][metric], "interval": record["intervals"][metric]}
            for metric in record["headline"]
        }
        rows[record["model"]].setdefault("results", {})[record["dataset"]] = own
    text = table(rows, records)
    atomic_write(chosen.output / "encoders.md", text)
    atomic_write(chosen.output / "encoders.json", json.dumps(rows, indent=1, ensure_ascii=False))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

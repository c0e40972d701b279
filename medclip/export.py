"""`medclip export`: a checkpoint as a folder that open_clip loads; alone, or blended with its base (WiSE-FT).

Every folder is loaded again by plain open_clip and compared before it is put in its place (`medclip.models.folder`). A
sweep over `alpha` writes `alpha_0.25/` and so on; with evaluations configured it scores each, writes `wiseft.json` and
`wiseft.png`, and names the best by one metric.

A checkpoint of a masked autoencoder becomes `mae.pth` with the names of the published weights, which MAE's own code and
`model.pretrained=` read; one of a classifier a folder that timm loads. `onnx=true` adds ONNX, `results=` a table to the
model card, and `push=` sends the folder to a hub.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.table import Table

from medclip.callbacks.lineage import shareable
from medclip.config import atomic_write, build, job_folder, output_folder, verb
from medclip.evals.console import progress
from medclip.evals.run import evaluate_checkpoint
from medclip.evals.wiseft import Sweep, best_alpha, draw
from medclip.evaluate import build_evals, check_evals, pick_device
from medclip.models.any import load_any
from medclip.models.build import differing_keys
from medclip.models.clip import Clip
from medclip.models.folder import placed, refuse_nonempty, write_folder
from medclip.models.hub import check_access, push_folder, repository
from medclip.models.lineage import describe, read_lineage, write_lineage
from medclip.models.mae import Mae, load_mae, mae_from, save_mae
from medclip.models.onnx import check_onnx, write_onnx
from medclip.models.timm_folder import write_timm
from medclip.models.vit import Classifier
from medclip.models.weights import read_checkpoint
from medclip.models.wiseft import blend
from medclip.types import UserError

_OURS_ALONE = {
    **{"vqa": "VQA model", "vqa_text": "VQA model that answers in words"},
    **{"dae": "denoising auto-encoder", "maml": "meta-learned net"},
}
_ANSWERS = "medclip evaluate eval=[vqa] answers questions with it"
_USES = {
    "vqa": f"{_ANSWERS}; model.types= takes one of experiment=medvqa_type",
    "vqa_text": _ANSWERS,
    **dict.fromkeys(("dae", "maml"), "model.visual (or a part's) pretrained= takes it (experiment=medvqa_mevf)"),
}


class Results(NamedTuple):
    """Records of a `results.json`, and the name in them of the model that is exported."""

    records: tuple[Mapping[str, Any], ...]
    model: str | None


def export(cfg: DictConfig) -> list[Path]:
    """Write the folders that the config asks for, and return them.

    Raises:
        UserError: a checkpoint that cannot be loaded, a base that is another model, an output folder that is not empty.
    """
    _check(cfg)
    folder = job_folder(cfg)
    refuse_nonempty(folder)
    results = read_results(cfg)
    kind = _kind(str(cfg.checkpoint))
    if kind in _OURS_ALONE:
        raise UserError(
            f"{cfg.checkpoint} is a {_OURS_ALONE[kind]}, of which no other program knows a format, so it is not "
            f"exported: {_USES[kind]}"
        )
    if kind in ("mae", "classifier"):
        if cfg.base is not None:
            called = "masked autoencoder" if kind == "mae" else "classifier"
            raise UserError(f"{cfg.checkpoint} is a {called}, which is not blended: leave base= and alpha= out")
        (_write_mae if kind == "mae" else _write_classifier)(folder, cfg, results)
        folders = [folder]
    else:
        folders = _export_clip(folder, cfg, results)
    if cfg.push is not None:
        where = push_folder(folder, repository(str(cfg.push)), private=cfg.private)
        _say(f"{where}: {'private' if cfg.private else 'public'}, one commit")
    return folders


def _export_clip(folder: Path, cfg: DictConfig, results: Results) -> list[Path]:
    clip: Clip = build(cfg.load, pretrained=cfg.checkpoint).eval()
    if cfg.base is None:
        _write(clip, folder, cfg, results, notes=f"Trained with medclip; written from `{shareable(cfg.checkpoint)}`.")
        return [folder]
    base: Clip = build(cfg.load, pretrained=cfg.base).eval()
    _refuse_other_model(base, clip)
    if not isinstance(cfg.alpha, ListConfig):
        _write_blend(base, clip, float(cfg.alpha), folder, cfg, results)
        return [folder]
    return _sweep(base, clip, cfg)


def _check(cfg: DictConfig) -> None:
    if (cfg.base is None) != (cfg.alpha is None):
        raise UserError(
            "a blend needs both base= (the model that the checkpoint grew from) and alpha= (0..1, or a list)"
        )
    alphas = list(cfg.alpha) if isinstance(cfg.alpha, ListConfig) else [] if cfg.alpha is None else [cfg.alpha]
    if wrong := [a for a in alphas if not isinstance(a, int | float) or not 0 <= a <= 1]:
        raise UserError(f"alpha={wrong[0]} is outside 0..1: 0 is the base, 1 the checkpoint")
    if (cfg.evals or cfg.metric) and len(alphas) < 2:
        raise UserError("evaluations score a sweep: give alpha=[0,0.25,0.5,0.75,1], or use `medclip evaluate`")
    if cfg.metric and str(cfg.metric).split("/")[0] not in cfg.evals:
        raise UserError(f"metric={cfg.metric} is of no configured evaluation ({', '.join(cfg.evals) or 'none'})")
    check_evals(cfg)
    if cfg.onnx:
        check_onnx(cfg.opset)
    if len(alphas) > 1 and (cfg.push is not None or cfg.results is not None):
        raise UserError("a sweep writes several models: choose one alpha for push= and results=")
    if cfg.push is not None:
        check_access(repository(str(cfg.push)), overwrite=cfg.overwrite)


def read_results(cfg: DictConfig) -> Results:
    """The records of `results=`, and which of the models in them is the exported one.

    Raises:
        UserError: no such file, no records of `medclip evaluate`, or no telling which model it is.
    """
    if cfg.results is None:
        return Results((), None)
    path = Path(str(cfg.results)).expanduser()
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        names = {str(record["model"]): str(record["pretrained"]) for record in records if record["metrics"]}
    except OSError as error:
        raise UserError(f"results={path} cannot be read ({error.strerror or error}): give a results.json") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"results={path} holds no records of `medclip evaluate` ({error!r})") from error
    if cfg.results_model is not None:
        if cfg.results_model not in names:
            raise UserError(f"results_model={cfg.results_model} is not in {path}: there are {', '.join(names)}")
        return Results(tuple(records), str(cfg.results_model))
    own = {_place(str(job_folder(cfg)))}  # a folder that was written before and evaluated
    if cfg.base is None:
        own.add(_place(str(cfg.checkpoint)))
    found = [name for name, source in names.items() if _place(source) in own]
    if len(found) != 1:
        raise UserError(f"results={path} is of {', '.join(names)}: say which of them this is with results_model=")
    return Results(tuple(records), found[0])


def _place(where: str) -> str:
    path = Path(where.removeprefix("local-dir:")).expanduser()
    return where if where.startswith("hf-hub:") else str(path.resolve())


def _kind(checkpoint: str) -> str | None:
    """Of what a checkpoint of `medclip train` is: "mae", "classifier", or None for a CLIP and all else."""
    path = Path(checkpoint).expanduser()
    content = read_checkpoint(path) if path.suffix == ".ckpt" and path.is_file() else {}
    description = content.get("medclip")
    return description.get("kind") if isinstance(description, Mapping) else None


def _write_classifier(folder: Path, cfg: DictConfig, results: Results) -> None:
    model = load_any(pretrained=str(cfg.checkpoint)).eval()
    assert isinstance(model, Classifier)
    notes = f"A classifier of findings, trained with medclip; written from `{shareable(cfg.checkpoint)}`."
    written = write_timm(model, folder, opset=_opset(cfg), **_told(folder, cfg, results, notes))
    _say(f"{folder}: read back by timm, logits differ by at most {written.read_back:.1e}{_of_onnx(written.onnx)}")


def _read_mae(checkpoint: str) -> Mae:
    path = Path(checkpoint).expanduser()
    description = read_checkpoint(path)["medclip"]
    try:
        mae = mae_from(description)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint} does not describe its masked autoencoder ({error!r}): was it made by another version?"
        ) from error
    load_mae(mae, path)
    return mae


def _write_mae(folder: Path, cfg: DictConfig, results: Results) -> None:
    """Write `folder/mae.pth`, read it back and compare; the folder appears when that is done."""
    if results.records:
        raise UserError("a masked autoencoder has no results: leave results= out")
    mae = _read_mae(str(cfg.checkpoint))
    with placed(folder) as part:
        save_mae(mae, part / "mae.pth")
        again = mae_from(mae.description)
        load_mae(again, part / "mae.pth")
        written = again.state_dict()
        if not all(torch.equal(value, written[key]) for key, value in mae.state_dict().items()):
            raise RuntimeError(f"{part} reads back as another model than was written")
        onnx = write_onnx(mae, part, opset=cfg.opset) if cfg.onnx else None
        write_lineage(shareable(read_lineage(str(cfg.checkpoint))), part)
    fed = mae.preprocess
    _say(
        f"{folder / 'mae.pth'}: read back, the same{_of_onnx(onnx)}. Its images have mean {list(fed.mean)} and std "
        f"{list(fed.std)}, which the file does not say."
    )


def _refuse_other_model(base: Clip, clip: Clip) -> None:
    if keys := differing_keys(base.description["model_cfg"], clip.description["model_cfg"]):
        raise UserError(f"base is another model than checkpoint: they differ in {', '.join(keys[:4])}")
    if base.preprocess != clip.preprocess:
        raise UserError(f"base wants other images than checkpoint: {base.preprocess} and {clip.preprocess}")


def _write(
    clip: Clip, folder: Path, cfg: DictConfig, results: Results, *, notes: str, lineage: dict[str, Any] | None = None
) -> None:
    told = _told(folder, cfg, results, notes)
    if lineage is not None:
        told["lineage"] = lineage
    written = write_folder(clip, folder, opset=_opset(cfg), **told)
    _say(
        f"{folder}: read back by open_clip, features differ by at most {written.read_back:.1e}{_of_onnx(written.onnx)}"
    )


def _told(folder: Path, cfg: DictConfig, results: Results, notes: str) -> dict[str, Any]:
    """What the model card tells, see `medclip.models.card.About`."""
    return {
        "title": str(cfg.title or folder.name),
        "notes": notes,
        "licence": cfg.license,
        "lineage": shareable(read_lineage(str(cfg.checkpoint))),
        "results": results.records,
        "this": results.model,
    }


def _opset(cfg: DictConfig) -> int | None:
    return cfg.opset if cfg.onnx else None


def _of_onnx(difference: float | None) -> str:
    return "" if difference is None else f"; onnxruntime's by {difference:.1e}"


def _say(line: str) -> None:
    Console().print(line, markup=False, highlight=False, soft_wrap=True)


def _write_blend(base: Clip, clip: Clip, alpha: float, folder: Path, cfg: DictConfig, results: Results) -> Clip:
    """Write the blend, and return it; `clip` itself stays as it is."""
    blended = copy.deepcopy(clip)
    blended.net.load_state_dict(blend(base.net.state_dict(), clip.net.state_dict(), alpha))
    names = shareable([cfg.base, cfg.checkpoint])
    notes = f"WiSE-FT blend (arXiv 2109.01903) at alpha={alpha:g} of `{names[0]}` (0) and `{names[1]}` (1)."
    architecture = cfg.load.get("architecture")
    ends = {name: describe(architecture, str(cfg[name])) for name in ("base", "checkpoint")}
    _write(blended, folder, cfg, results, notes=notes, lineage=shareable({"blend": {"alpha": alpha, **ends}}))
    return blended


def _sweep(base: Clip, clip: Clip, cfg: DictConfig) -> list[Path]:
    device = pick_device(cfg.device)
    folder = output_folder(cfg)
    evals = build_evals(cfg)
    folders: dict[float, Path] = {}
    sweep = Sweep()
    with progress() as progress_of:
        for alpha in dict.fromkeys(float(a) for a in cfg.alpha):
            folders[alpha] = folder / f"alpha_{alpha:g}"
            blended = _write_blend(base, clip, alpha, folders[alpha], cfg, Results((), None)).to(device)
            results = evaluate_checkpoint(
                blended,
                evals,
                batch_size=cfg.batch_size,
                workers=cfg.workers,
                on_progress=progress_of(f"alpha {alpha:g}"),
            )
            sweep.add(alpha, results)
            if cfg.metric and cfg.metric not in sweep.scores[alpha]:
                raise UserError(f"metric={cfg.metric} is not measured: choose one of {', '.join(sweep.scores[alpha])}")
    lower = cfg.metric in sweep.lower_is_better
    best = best_alpha(sweep.scores, cfg.metric, lower_is_better=lower) if cfg.metric else None
    _report(folder, sweep, best, cfg)
    return list(folders.values())


def _report(folder: Path, sweep: Sweep, best: float | None, cfg: DictConfig) -> None:
    content = {
        "base": str(cfg.base),
        "checkpoint": str(cfg.checkpoint),
        "metric": cfg.metric,
        "best": None if best is None else {"alpha": best, "folder": f"alpha_{best:g}"},
        "alphas": [
            {"alpha": alpha, "folder": f"alpha_{alpha:g}", "metrics": _finite(values)}
            for alpha, values in sweep.scores.items()
        ],
        "tradeoff": [_finite(point._asdict()) for point in sweep.tradeoff()],
    }
    atomic_write(folder / "wiseft.json", json.dumps(content, indent=2, allow_nan=False))
    if not sweep.roles:
        return
    atomic_write(folder / "wiseft.png", draw(sweep))
    table = Table("alpha", *sweep.roles, title="WiSE-FT: 0 is the base, 1 the checkpoint")
    for alpha, values in sweep.scores.items():
        cells = [f"{values[key]:.3f}" for key in sweep.roles]
        table.add_row(f"{alpha:g}" + (" (best)" if alpha == best else ""), *cells)
    Console().print(table)
    if best is not None:
        _say(f"best {cfg.metric}: {folder / f'alpha_{best:g}'}")


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in values.items()}


main = verb("export")(export)

if __name__ == "__main__":
    main()

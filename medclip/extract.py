"""`medclip extract`: slides in; shards, coordinates, features and a manifest out.

All of it is `slides`; this verb composes the request, and brings the model. A run that was killed goes on when the same
command is given again, inside a slide too.
"""

from __future__ import annotations

import functools
import io
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from medclip.config import build, job_folder, verb
from medclip.evaluate import pick_device
from medclip.types import UserError
from slides.cohort import read_cohort, take_part
from slides.entry import Entry
from slides.errors import SlideError
from slides.extract import Output, work
from slides.features import FeatureOutput, claimed, extract_features
from slides.features_on_ray import features_on_ray
from slides.files import write_whole
from slides.mpp import read_mpp_table
from slides.plan import Plan
from slides.request import Request
from slides.run import claim, run, split_cores
from slides.stream import Encoding


def extract(cfg: DictConfig) -> list[dict[str, Any]]:
    """Run the configured extraction, and return the manifest's rows.

    Raises:
        UserError: whatever in the config does not fit, a folder of other settings, no slide found, a full disk.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    try:
        return _extract(cfg)
    except SlideError as error:
        raise UserError(str(error)) from error


def _extract(cfg: DictConfig) -> list[dict[str, Any]]:
    wanted = list(cfg.save) if OmegaConf.is_list(cfg.save) else [cfg.save] if cfg.save else []
    save = tuple(dict.fromkeys(str(name) for name in wanted if name != "features"))
    features = "features" in wanted
    _check(cfg, save, features)
    request = Request.parse(_plain(cfg.slides))
    folder = job_folder(cfg)
    encoding = _encoding(cfg)
    entries = _entries(cfg)
    rows: list[dict[str, Any]] = []
    if save:
        output = Output(str(folder), save, cfg.layout, encoding, cfg.per_shard, cfg.drawings)
        processes, threads = split_cores(len(entries), cfg.processes, cfg.threads)
        if cfg.engine == "ray" and cfg.processes is None:
            processes, threads = 0, cfg.threads or 1
        mark = output.fingerprint(request)
        claim(folder, mark)  # before anything is written of this run
        write_whole(folder / "config.yaml", OmegaConf.to_yaml(cfg).encode())
        call = functools.partial(work, request=request, output=output, threads=threads)
        rows = run(entries, call, folder, settings=mark, engine=cfg.engine, processes=processes, cpus=threads)
        _tell(rows, folder)
    if features:
        rows = _features(cfg, request, entries, folder)
    if rows and all(row["status"] in ("failed", "busy") for row in rows):
        raise UserError(f"no slide could be used, e.g. {rows[0]['slide']}: {rows[0]['reason']}")
    return rows


def _check(cfg: DictConfig, save: tuple[str, ...], features: bool) -> None:
    encoder = cfg.encoder is not None
    if features and not encoder:
        raise UserError("save names features: say which model makes them, e.g. encoder=clip encoder.checkpoint=PATH")
    if encoder and not features:
        raise UserError("an encoder is given, and nothing to save of it: say save=[coords,features]")
    if not save and not features:
        raise UserError("save is empty: choose of shards, images, arrays, coords, features")
    if cfg.engine not in ("local", "ray"):
        raise UserError(f"engine={cfg.engine} is unknown: local or ray")
    if isinstance(cfg.gpus, bool) or not isinstance(cfg.gpus, int | float) or not 0 <= cfg.gpus < math.inf:
        raise UserError(f"gpus={cfg.gpus}: give the GPUs of a slide, e.g. 1, or 0.5 where two share one")
    if cfg.gpus and not (features and cfg.engine == "ray"):
        raise UserError("gpus is for engine=ray and save=[features]; elsewhere say device=cuda")
    if cfg.gpus and save:
        raise UserError("gpus would wait while patches are written: run save=[features] by itself")
    if cfg.coords is not None and save:
        raise UserError("coords takes the patches of another run: save=[features] alone goes with it")
    for key in ("processes", "threads", "batch_size", "block", "per_shard"):
        if cfg[key] is None and key in ("processes", "threads"):
            continue
        if not isinstance(cfg[key], int) or cfg[key] < 1:
            raise UserError(f"{key}={cfg[key]}: give a whole number, 1 or more")
    if cfg.slide_mpp is not None and not isinstance(cfg.slide_mpp, int | float):
        raise UserError(f"slide_mpp={cfg.slide_mpp}: give µm a level-0 pixel, e.g. 0.25")


def _encoding(cfg: DictConfig) -> Encoding:
    try:
        return Encoding(**_plain(cfg.encoding))
    except TypeError as error:
        raise UserError(f"encoding: an unknown key, or a value of the wrong type ({error})") from None


def _plain(node: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _entries(cfg: DictConfig) -> list[Entry]:
    source = OmegaConf.to_container(cfg.cohort) if OmegaConf.is_list(cfg.cohort) else str(cfg.cohort)
    table = read_mpp_table(Path(cfg.mpp_table).expanduser()) if cfg.mpp_table is not None else None
    entries = read_cohort(source, mpp=cfg.slide_mpp, mpp_table=table)  # type: ignore[arg-type]
    if cfg.part is None:
        return entries
    if not OmegaConf.is_list(cfg.part) or len(cfg.part) != 2:
        raise UserError(f"part={cfg.part}: give two numbers, e.g. part=[2,8]")
    return take_part(entries, *cfg.part)


def _features(cfg: DictConfig, request: Request, entries: list[Entry], folder: Path) -> list[dict[str, Any]]:
    on_ray = cfg.engine == "ray"
    encoder = build(cfg.encoder, device=torch.device("cpu") if on_ray else pick_device(cfg.device))
    output = FeatureOutput(str(folder), cfg.layout, cfg.features_format, cfg.batch_size, cfg.block, cfg.coords)
    claimed(request, output, encoder)
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(cfg).encode())
    told = write_pt if cfg.layout == "clam" else None
    if on_ray:
        make = functools.partial(make_encoder, _plain(cfg.encoder), str(cfg.device))
        options = {"gpus": cfg.gpus, "at_once": cfg.processes or 0, "threads": cfg.threads or 1}
        report = features_on_ray(entries, request, output, make, encoder, **options, written_one=told)
        _tell(report.rows, folder)
        return report.rows
    threads = cfg.threads or split_cores(1)[1]
    report = extract_features(entries, request, output, encoder, threads=threads, written_one=told)
    _tell(report.rows, folder)
    Console().print(f"the model waited for patches {report.waiting:.1%} of the time", highlight=False)
    return report.rows


def make_encoder(config: dict[str, Any], device: str) -> Any:
    """The model of `encoder`, in a worker of Ray, which sees the GPU that is its own."""
    return build(OmegaConf.create(config), device=pick_device(device))


def write_pt(plan: Plan, path: Path, features: np.ndarray) -> None:
    """CLAM trains on pt_files/SLIDE.pt, a tensor (n, d)."""
    raw = io.BytesIO()
    torch.save(torch.from_numpy(features), raw)
    write_whole(path.parent.parent / "pt_files" / f"{plan.slide}.pt", raw.getvalue())


def _tell(rows: list[dict[str, Any]], folder: Path) -> None:
    """What came of it, with the first few failures by name."""
    console = Console()
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "empty", "failed", "busy")}
    words = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    patches, corrupt = (sum(row.get(key) or 0 for row in rows) for key in ("patches", "corrupt"))
    lines = [f"{len(rows)} slides ({words}), {patches} patches, {corrupt} corrupt: {folder}"]
    bad = [row for row in rows if row["status"] in ("failed", "busy")]
    lines += [f"  {row['slide']}: {row['reason']}" for row in bad[:5]]
    if len(bad) > 5:
        lines.append(f"  … and {len(bad) - 5} more: see manifest.csv")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


main = verb("extract")(extract)

if __name__ == "__main__":
    main()

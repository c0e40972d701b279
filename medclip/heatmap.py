"""`medclip heatmap`: slides, their features and a checkpoint in; maps over the slides out.

All drawing is `slides`; this verb brings the model that gives patches their values. A run that was killed goes on when
the same command is given again: finished slides are passed over.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from medclip.config import build, job_folder, verb
from medclip.evaluate import pick_device
from medclip.types import UserError
from slides.cohort import read_cohort, take_part
from slides.entry import Entry
from slides.errors import SlideError
from slides.files import write_whole
from slides.heat_slide import Look, Source, fingerprint, heat_slide
from slides.identity import identity
from slides.mpp import read_mpp_table
from slides.run import claim, run


def heatmap(cfg: DictConfig) -> list[dict[str, Any]]:
    """Draw the configured maps, and return the manifest's rows.

    Raises:
        UserError: whatever in the config does not fit, a checkpoint that cannot be loaded, a folder of other settings,
            no slide found, no slide that could be drawn, a full disk.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    try:
        return _heatmap(cfg)
    except SlideError as error:
        raise UserError(str(error)) from error


def _heatmap(cfg: DictConfig) -> list[dict[str, Any]]:
    look = look_of(cfg)
    features = Path(str(cfg.features)).expanduser()
    if not features.is_dir():
        raise UserError(f"features={features} is no folder: give the one that holds ID.h5 (features_… of extract)")
    entries = _entries(cfg)
    folder = job_folder(cfg)
    with open_dict(cfg):
        cfg.device = str(pick_device(cfg.device))
    source: Any = build(cfg.source)
    mark = fingerprint(look, [_plain(cfg.source), str(features), _weights(str(cfg.checkpoint))])
    claim(folder, mark)  # before anything is written of this run
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(cfg).encode())
    work = functools.partial(
        heat_slide, features=features, folder=folder, look=look, source=_Told(source), settings=mark
    )
    rows = run(entries, work, folder, settings=mark)
    _tell(rows, folder)
    if rows and all(row["status"] != "ok" for row in rows):
        raise UserError(f"no slide could be drawn, e.g. {rows[0]['slide']}: {rows[0]['reason']}")
    return rows


class _Told:
    """A source whose complaints are the slide's, not the run's."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.name, self.label, self.signed = source.name, source.label, source.signed

    def __call__(self, features: np.ndarray, about: Mapping[str, Any], where: str) -> np.ndarray:
        try:
            return self.source(features, about, where)
        except UserError as error:
            raise SlideError(str(error)) from error


def look_of(cfg: DictConfig) -> Look:
    """How the maps look.

    Raises:
        SlideError: an option that makes no sense.
        UserError: a value of the wrong type.
    """
    wanted = [cfg.save] if isinstance(cfg.save, str) else list(cfg.save or [])
    try:
        return Look(
            save=tuple(dict.fromkeys(map(str, wanted))),
            palette=cfg.palette,
            percentiles=tuple(cfg.percentiles),
            limits=None if cfg.limits is None else tuple(cfg.limits),
            smooth=float(cfg.smooth),
            alpha=float(cfg.alpha),
            longest=int(cfg.png.longest),
            grey=bool(cfg.png.grey),
            downsample=int(cfg.tiff.downsample),
            compression=cfg.tiff.compression,
            over=bool(cfg.tiff.over),
            patches=bool(cfg.geojson.patches),
            threshold=cfg.regions.value,
            threshold_percentile=cfg.regions.percentile,
            min_area=float(cfg.regions.min_area),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"a value has the wrong type ({error}): see `--cfg job`") from None


def _weights(checkpoint: str) -> str:
    """What tells one checkpoint of a name from another: a file's content, else the name alone."""
    path = Path(checkpoint).expanduser()
    return identity(path) if path.is_file() else checkpoint


def _plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def _entries(cfg: DictConfig) -> list[Entry]:
    source: Any = OmegaConf.to_container(cfg.cohort) if OmegaConf.is_list(cfg.cohort) else str(cfg.cohort)
    table = read_mpp_table(Path(cfg.mpp_table).expanduser()) if cfg.mpp_table is not None else None
    entries = read_cohort(source, mpp=cfg.slide_mpp, mpp_table=table)
    if cfg.part is None:
        return entries
    if not OmegaConf.is_list(cfg.part) or len(cfg.part) != 2:
        raise UserError(f"part={cfg.part}: give two numbers, e.g. part=[2,8]")
    return take_part(entries, *cfg.part)


def _tell(rows: list[dict[str, Any]], folder: Path) -> None:
    """What came of it, with the first few failures by name."""
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "busy")}
    words = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    lines = [f"{len(rows)} slides ({words}): {folder}"]
    bad = [row for row in rows if row["status"] in ("failed", "busy")]
    lines += [f"  {row['slide']}: {row['reason']}" for row in bad[:5]]
    if len(bad) > 5:
        lines.append(f"  … and {len(bad) - 5} more: see manifest.csv")
    for line in lines:
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


main = verb("heatmap")(heatmap)

if __name__ == "__main__":
    main()

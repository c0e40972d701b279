"""Sources are data, not code: a list of mappings in a config becomes random-access sources.

    data.sources:
      - {urls: "shards/{00000..00099}.tar", weight: 1, filter: '"Microscopy" in primary_label', caption: {field: txt}}
      - {table: pairs.jsonl, split: {by: case, part: train}}
      - {folder: images/, caption: false}
      - {phantoms: {kind: xray, samples: 1000}}
      - {table: train.json, image_root: imgs, questions: {question: question, answer: answer, type: answer_type}}
      - {slides: {cohort: "slides/*.svs", size: 256, mpp: 0.5}, caption: label}
      - {slides: {table: pathgen.jsonl, root: slides/, size: 336, mpp: 0.5}}
      - {arrays: {images: "test_x.h5:x", labels: "test_y.h5:y"}, caption: false}
      - {arrow: "ubench/*.arrow", caption: false}

Keys of one: exactly one of `urls` (shards), `table`, `folder`, `phantoms`, `slides`, `arrays` (see `arrays`) or `arrow`
(see `arrow`); and, all optional,

| key | meaning |
|---|---|
| `name` | in messages and reports |
| `weight` | passes over this source in one epoch (1) |
| `caption` | see `captions.CaptionRule`: a field's name, `{field \\| fields, choose, fit, lines}`, or false |
| `filter` | see `filters` |
| `split` | `{by: case, part: train \\| test, fraction: 0.2, seed: 0}`; a group is never in two parts |
| `keep` | keep-list: .parquet (column `key`), .npy or .txt; or a few samples, see below |
| `questions` | its samples are questions about images: which field says what (see `questions`) |
| `labels` | how its labels are made, or false for none; over `data.labels` (see `labels`) |
| `statistics` | `{mean, std}` of its images on a 0..1 scale, in place of the model's |
| `burned_in` | true takes DICOM pictures that say they hold burned-in annotation |
| `group` | field of the patient, or false; over `data.group` |
| `image_root`, `columns`, `header`, `suffix`, `separator` | tables only, see `tables.open_table` |
| `join`, `majority`, `extract`, `image_path`, `search` | tables only, see `reshape` |

A few samples, after `filter` and `split` (a validation source has a `keep` of its own):

    keep: {per_class: 16, seed: 0}                                      # of each class of its labels
    keep: {fraction: 0.1, by: Patient ID, seed: 0, list: train.txt}     # a tenth of the patients on the list

`by` is a field of groups that are kept whole; without it each sample is for itself. See `selection.apply_few`.

Keys of `slides` (see `slides`): `cohort` (a folder, patterns or a CSV of slides), or `table` and `root`; and, optional,

| key | meaning |
|---|---|
| `size`, `mpp` | pixels of a patch (256) and µm each (0.5; null: each slide's own) |
| `coverage`, `overlap`, `tissue`, `masks`, … | cohorts only: any key of `slides.request.Request` |
| `side` | tables only: level-0 pixels of a patch, whatever they measure, in place of `mpp` (PathGen: 672) |
| `exact`, `icc`, `stain`, `stain_target` | how pixels are decoded and recoloured |
| `slide_mpp` | of slides whose files and CSV do not say |

How bytes are read is one mapping for all sources, `data.storage`; every key is optional:

| key | meaning |
|---|---|
| `index` | folder of tar indexes, filter answers and slides' plans (`~/.cache/medclip/index`) |
| `cache` | disk cache of remote shards: false, its folder, or `{folder, max_gb: 20, block_mb: 4}` |
| `tries`, `backoff`, `timeout` | attempts at a remote read (8), seconds of the first wait (0.25), of silence (30) |
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medclip.data import cache as caches
from medclip.data import declared
from medclip.data import index as indexes
from medclip.data.arrays import open_arrays
from medclip.data.arrow import open_arrow
from medclip.data.captions import CaptionRule
from medclip.data.embedded import unpack
from medclip.data.folders import open_folder
from medclip.data.generated import open_phantoms, questions_of
from medclip.data.http import public
from medclip.data.labels import LabelRule
from medclip.data.questions import QuestionSource, ask, check_ids
from medclip.data.raw import RawSample, Source
from medclip.data.selection import apply_few, apply_filter, apply_keep, apply_split
from medclip.data.shards import ShardSource
from medclip.data.slides import open_slides
from medclip.data.storage import Storage, expand, is_local, local_path
from medclip.data.tables import open_table
from medclip.types import UserError

__all__ = ["RawSample", "Source", "open_sources", "open_storage"]

_log = logging.getLogger(__name__)
_KINDS = ("urls", "table", "folder", "phantoms", "slides", "arrays", "arrow")
_OF_TABLES = (
    *("image_root", "columns", "header", "suffix", "separator"),
    *("join", "majority", "extract", "image_path", "search"),
)
_KEYS = (*_KINDS, "name", "weight", "caption", "filter", "split", "keep", "questions", *declared.KEYS, *_OF_TABLES)


def open_sources(
    configs: Sequence[Mapping[str, Any]],
    *,
    index: str | Path | None = None,
    storage: Storage | None = None,
    opened: Callable[[Source], None] | None = None,
    rules: Sequence[LabelRule | None] = (),
    **options: Any,
) -> list[Source]:
    """Open every source: index its shards, then filter, split and keep.

    Args:
        configs: one mapping a source, see above.
        index: folder for tar indexes and filter results; None for the user's cache folder.
        storage: reads the bytes; None makes one from `options`.
        opened: told of each source before anything is selected from it.
        rules: how each source's labels are made, for `keep: {per_class: k}`; () for what its own `labels` say.
        **options: of `open_storage`.

    Raises:
        UserError: whatever in a config does not fit, or a source is empty.
    """
    storage = storage or open_storage(**options)
    folder = Path(index).expanduser() if index is not None else indexes.default_folder()
    if not rules:
        rules = [declared.Declared.parse(config).labels for config in configs]
    return [_open(c, storage, folder, opened, rule) for c, rule in zip(configs, rules, strict=True)]


def open_storage(cache: Mapping[str, Any] | str | Path | bool | None = None, **options: Any) -> Storage:
    """Storage with the settings of a config.

    Args:
        cache: disk cache of remote shards: its folder, or `{folder, max_gb, block_mb}`, or false for none.
        **options: of `Storage`: tries, backoff, timeout.

    Raises:
        UserError: an unknown setting, or a cache folder that cannot be written.
    """
    if unknown := set(options) - {"tries", "backoff", "timeout"}:
        raise UserError(
            f"data.storage has unknown keys {sorted(unknown)}: use cache, index, tries, backoff and timeout"
        )
    try:
        numbers: dict[str, Any] = {k: (int if k == "tries" else float)(options[k]) for k in options}
    except (TypeError, ValueError):
        numbers = {}
    if len(numbers) < len(options) or numbers.get("tries", 1) < 1 or any(v < 0 for v in numbers.values()):
        raise UserError(f"data.storage {options}: tries must be at least 1, backoff and timeout seconds")
    if cache is False:
        return Storage(None, **numbers)
    settings: dict[str, Any] = dict(cache) if isinstance(cache, Mapping) else {}
    if isinstance(cache, str | Path):
        settings = {"folder": cache}
    if unknown := set(settings) - {"folder", "max_gb", "block_mb"}:
        raise UserError(f"data.storage.cache has unknown keys {sorted(unknown)}: use folder, max_gb and block_mb")
    folder = Path(settings["folder"]).expanduser() if settings.get("folder") else caches.default_folder()
    try:
        block, most = int(float(settings.get("block_mb", 4)) * (1 << 20)), float(settings.get("max_gb", 20))
    except (TypeError, ValueError):
        block, most = 0, 0.0
    if block < 1 or most <= 0:
        raise UserError(f"data.storage.cache {settings}: max_gb and block_mb must be positive numbers")
    try:
        return Storage(caches.BlockCache(folder, most, block), **numbers)
    except OSError as error:
        if not settings.get("folder"):
            return Storage(None, **numbers)  # nobody asked for this one
        raise UserError(
            f"cannot write to data.storage.cache.folder {folder} ({error.strerror}): choose another, or cache=false"
        ) from error


def _open(
    config: Mapping[str, Any],
    storage: Storage,
    folder: Path,
    opened: Callable[[Source], None] | None,
    rule: LabelRule | None,
) -> Source:
    kinds = [kind for kind in _KINDS if config.get(kind) is not None]
    if unknown := set(config) - set(_KEYS):
        raise UserError(f"a source has unknown keys {sorted(map(str, unknown))}: use {', '.join(_KEYS)}")
    if len(kinds) != 1:
        raise UserError(
            f"a source needs exactly one of {', '.join(_KINDS)}; this one has {' and '.join(kinds) or 'none'} "
            f"(its keys: {', '.join(map(str, config)) or 'none'})"
        )
    kind = kinds[0]
    target = config[kind]
    name = str(config.get("name") or (kind if kind in ("phantoms", "slides", "arrays") else _name(target)))
    if kind != "table" and (unfit := [key for key in _OF_TABLES if config.get(key) is not None]):
        raise UserError(f"source {name}: {', '.join(unfit)} belongs to tables, this one has {kind}")
    try:
        weight = float(config.get("weight", 1))
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 < weight < 1e6:
        raise UserError(f"source {name}: weight is {config.get('weight')!r}, not a positive number")
    questions = config.get("questions") or (questions_of(target) if kind == "phantoms" else None)
    caption = config.get("caption")
    caption = CaptionRule.parse("vqa.question" if questions and caption is None else caption)
    if kind == "urls":
        shards = indexes.index_shards(storage, expand(target), folder)
        source: Source = ShardSource.open(name, storage, shards, caption, weight)
    elif kind == "table":
        options = {key: config[key] for key in _OF_TABLES if config.get(key) is not None}
        if (unpacked := unpack(str(target), folder)) is not None:
            target, options["image_root"] = unpacked, None
        source = open_table(name, str(target), caption, weight, **options)
    elif kind == "folder":
        source = open_folder(name, str(target), caption, weight)
    elif kind == "phantoms":
        source = open_phantoms(name, target, caption, weight)
    elif kind == "arrays":
        source = open_arrays(name, target, caption, weight)
    elif kind == "arrow":
        source = open_arrow(name, target, caption, weight)
    else:
        source = open_slides(name, target, caption, weight, folder=folder)
    if questions:
        source = ask(source, questions)
    if opened is not None:
        opened(source)
    if config.get("filter"):
        source = apply_filter(source, str(config["filter"]), folder)
    if config.get("split"):
        source = apply_split(source, config["split"], folder)
    keep = config.get("keep")
    if isinstance(keep, Mapping):
        source = apply_few(source, keep, folder, rule)
    elif keep:
        source = apply_keep(source, str(keep))
    if isinstance(source, QuestionSource):
        check_ids(source)
    if source.problems:
        reasons = Counter(reason for _, reason, _ in source.problems)
        shown = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common(4))
        _log.warning("source %s: %d samples left out (%s)", name, len(source.problems), shown)
    return source


def _name(target: str | Sequence[str]) -> str:
    """A short name: the last folder and file of the first URL."""
    first = target if isinstance(target, str) else str(target[0]) if target else "empty"
    first = first.split("::")[0]
    if is_local(first):
        return os.path.relpath(local_path(first))
    return "/".join(public(first).rstrip("/").split("/")[-2:])

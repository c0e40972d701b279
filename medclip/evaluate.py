"""`medclip evaluate`: checkpoints in, `report.html`, `results.json` and a table out.

Checkpoints are loaded one after the other, so several large ones need the memory of one; the first is the base that the
others are compared with, on the same samples and the same bootstrap resamples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from medclip.config import atomic_write, build, output_folder, verb
from medclip.evals.bootstrap import Bootstrap
from medclip.evals.card import KEYS, Card
from medclip.evals.console import headline_table, progress
from medclip.evals.records import records, suites_json
from medclip.evals.report import write_report
from medclip.evals.result import EvalData, Evaluation, Role
from medclip.evals.run import Precision, Report, evaluate_checkpoint, make_report
from medclip.evals.suite import Suite, suite_lines
from medclip.types import UserError


def evaluate(cfg: DictConfig) -> Report:
    """Run the configured evaluations on the configured checkpoints.

    Raises:
        UserError: no checkpoint or no evaluation given, a checkpoint that cannot be loaded, an empty set, labels that
            are no configured class, an output folder that is not empty.
    """
    checkpoints = named_checkpoints(cfg)
    if not cfg.evals:
        raise UserError("no evaluation given: say e.g. eval=[zeroshot] and fill evals.zeroshot.data.sources")
    settings = bootstrap_settings(cfg.bootstrap)
    cfg, suites = complete_suites(cfg)
    check_evals(cfg)
    if cfg.precision not in get_args(Precision):
        raise UserError(f"precision={cfg.precision}: choose one of {', '.join(get_args(Precision))}")
    set_decode(cfg)
    cards = cards_of(cfg.evals)
    folder = output_folder(cfg)
    OmegaConf.update(cfg, "output", str(folder))  # which loggers interpolate; a sweep's job has got one of its own
    device = pick_device(cfg.device)
    evals = build_evals(cfg)
    results = {}
    with progress() as progress_of:
        for name, source in checkpoints.items():
            clip = build(cfg.load, pretrained=source).to(device).eval()
            found = evaluate_checkpoint(
                clip,
                evals,
                batch_size=cfg.batch_size,
                workers=cfg.workers,
                precision=cfg.precision,
                on_progress=progress_of(name),
            )
            results[name] = {k: replace(r, domain=cards[k].domain, source=cards[k].source) for k, r in found.items()}
            del clip
    list_skipped(sets_of(evals), folder)
    report = make_report(results, settings=settings, sources=checkpoints, suites=suites)
    page = write_report(report, folder)
    for logger in build(cfg.logger).values():
        if (log := getattr(logger, "log_results", None)) is not None:
            log(records(report), checkpoints)
    if report.suites:
        atomic_write(folder / "suites.json", suites_json(report.suites))
    console = Console()
    console.print(headline_table(report))
    for suite in report.suites.values():
        console.print(suite_lines(suite), markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    return report


def check_evals(cfg: DictConfig) -> None:
    """Refuse settings of `cfg.evals` under which nothing would be evaluated or shown, before anything is written.

    Raises:
        UserError: a role that the report does not know, no batch size, or a set that is not there.
    """
    for name, node in cfg.evals.items():
        if (role := node.get("role", "domain")) not in get_args(Role):
            raise UserError(f"evals.{name}.role={role}: choose one of {', '.join(get_args(Role))}")
    if not isinstance(cfg.batch_size, int) or cfg.batch_size < 1:
        raise UserError(f"batch_size={cfg.batch_size}: give a whole number of at least 1")
    refuse_missing(cfg.evals)


def refuse_missing(evals: DictConfig) -> None:
    """Say how to get a set that is not there.

    Raises:
        UserError: of the first of `evals` whose set is missing.
    """
    if lacking := sets_missing(evals):
        name, card = next(iter(lacking.items()))
        more = f" (nor are there the sets of {', '.join(list(lacking)[1:])})" if len(lacking) > 1 else ""
        raise UserError(
            f"evaluation {name!r}: {card.root} has no {' and no '.join(card.missing()[:2])}{more}: get it from "
            f"{card.get}; set evals.{name}.root if it lies elsewhere"
        )


def cards_of(evals: DictConfig) -> dict[str, Card]:
    """What each evaluation's config says of its set."""
    return {
        str(name): Card.parse(str(name), {key: node[key] for key in KEYS if key in node})
        for name, node in evals.items()
    }


def sets_missing(evals: DictConfig) -> dict[str, Card]:
    """Evaluations whose set is not where their config looks for it, and its card."""
    # Sources that were pointed elsewhere do not need the folder.
    return {
        name: card
        for name, card in cards_of(evals).items()
        if card.missing() and _reads(OmegaConf.to_container(evals[name].data, resolve=True), str(card.root))
    }


def _reads(node: Any, root: str) -> bool:
    """Whether a text anywhere in `node` is the folder `root` or lies in it."""
    if isinstance(node, Mapping | list):
        return any(_reads(value, root) for value in (node.values() if isinstance(node, Mapping) else node))
    return isinstance(node, str) and (node == root or node.startswith(root.rstrip("/") + "/"))


def complete_suites(cfg: DictConfig) -> tuple[DictConfig, list[Suite]]:
    """The suites of `cfg.suites`, before anything is evaluated; and the config, without sets that are not there.

    Raises:
        UserError: a set of a suite is missing, unless `suite_incomplete=allow`.
    """
    if cfg.suite_incomplete not in ("refuse", "allow"):
        raise UserError(f"suite_incomplete={cfg.suite_incomplete}: choose refuse or allow")
    if not cfg.suites:
        return cfg, []
    lacking = sets_missing(cfg.evals)
    core = [name for name, card in cards_of(cfg.evals).items() if card.core]
    suites = []
    for name, node in cfg.suites.items():
        tasks = tuple(map(str, node.tasks))
        absent = [task for task in tasks if task in lacking or task not in cfg.evals]
        if absent and (cfg.suite_incomplete == "refuse" or len(absent) == len(tasks)):
            raise UserError(
                f"suite {name} is incomplete: {len(absent)} of its {len(tasks)} sets are not there "
                f"({', '.join(absent)}): get them as docs/evaluation.md says, set paths.data_root or evals.NAME.root, "
                "or say suite_incomplete=allow for an average over the others, which is no result of the suite"
            )
        suites.append(Suite(str(name), tasks, node.get("metric", "acc1"), tuple(t for t in tasks if t in core)))
    cfg = cfg.copy()
    with open_dict(cfg):
        for task in {task for suite in suites for task in suite.tasks} & set(lacking):
            del cfg.evals[task]
    return cfg, suites


def set_decode(cfg: DictConfig) -> None:
    """Tell every set of `sources` that does not say `exact` itself how `cfg.decode` wants its images decoded.

    Raises:
        UserError: another word than exact or fast.
    """
    if cfg.decode not in ("exact", "fast"):
        raise UserError(f"decode={cfg.decode}: choose exact or fast")
    if cfg.decode == "exact":  # as they do by themselves
        return
    for node in cfg.evals.values():
        for part in ("data", "train", "validation"):
            data = node.get(part)
            if isinstance(data, DictConfig) and "sources" in data and "exact" not in data:
                with open_dict(data):
                    data.exact = False


def build_evals(cfg: DictConfig) -> dict[str, Evaluation]:
    """The evaluations of `cfg.evals` by name."""
    return {str(name): build(_without_card(cfg.evals[name]), name=str(name)) for name in cfg.evals}


def _without_card(node: DictConfig) -> DictConfig:
    own = deepcopy(node)  # whose interpolations still look into the whole config
    with open_dict(own):
        for key in KEYS:
            own.pop(key, None)
    return own


def small_evals(evals: DictConfig, limit: int | None = None) -> dict[str, Evaluation]:
    """The evaluations of `evals` by name, each on at most `limit` samples where its own config sets no limit.

    Raises:
        UserError: an evaluation that is not told which samples.
    """
    evals = deepcopy(evals)
    for name, node in evals.items():
        if missing := sorted(OmegaConf.missing_keys(node)):
            raise UserError(f"evals.{name}.{missing[0]} is missing: say evals.{name}.{missing[0]}=…")
        if limit is not None and node.data.get("limit") is None:
            with open_dict(node):
                node.data.limit = limit
    refuse_missing(evals)
    return build_evals(OmegaConf.create({"evals": evals}))


def sets_of(evals: Mapping[str, Evaluation]) -> dict[str, EvalData]:
    """Every set that was read, by the evaluation's name; sets to learn or choose from have their own."""
    sets = {name: evaluation.data for name, evaluation in evals.items()}
    for part in ("validation", "train"):
        own = {name: getattr(evaluation, part, None) for name, evaluation in evals.items()}
        sets |= {f"{name} ({part})": data for name, data in own.items() if data is not None}
    return sets


def list_skipped(sets: Mapping[str, EvalData], folder: Path) -> None:
    """Write `skipped.jsonl`, a line a sample that an evaluation could not use; no file where there is none."""
    rows = [
        {"evaluation": name, "key": key, "reason": reason, "detail": detail}
        for name, data in sets.items()
        for key, reason, detail in data.bad
    ]
    if rows:
        atomic_write(folder / "skipped.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def named_checkpoints(cfg: DictConfig) -> dict[str, str]:
    """Name -> checkpoint, base first.

    Raises:
        UserError: none given, or given both ways.
    """
    several = {str(name): str(path) for name, path in (cfg.checkpoints or {}).items() if path is not None}
    if (cfg.checkpoint is None) == (not several):
        raise UserError(
            "give either checkpoint=PATH or several, checkpoints.base=PATH checkpoints.adapted=PATH"
            + (": both were given" if several else "")
        )
    return several or {"checkpoint": str(cfg.checkpoint)}


def bootstrap_settings(cfg: DictConfig) -> Bootstrap:
    """Checked settings of the bootstrap.

    Raises:
        UserError: too few samples, a level outside 0..1, or no numbers.
    """
    settings = Bootstrap(**cfg)  # type: ignore[arg-type]
    numbers = isinstance(settings.samples, int) and isinstance(settings.level, float | int)
    if not numbers or settings.samples < 100 or not 0 < settings.level < 1:
        raise UserError(f"bootstrap.samples={settings.samples} must be at least 100, level={settings.level} in 0..1")
    return settings


def pick_device(wanted: str) -> torch.device:
    """The device to evaluate on; "auto" is the GPU if there is one.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={wanted} cannot be used here: say device=cpu, or auto") from error
    return device


main = verb("evaluate")(evaluate)

if __name__ == "__main__":
    main()

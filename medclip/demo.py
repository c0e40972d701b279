"""`medclip demo`: the whole way, by the very commands that a user would type.

Writes generated shards, trains a small base CLIP on one domain, continues it on another, evaluates both and their
WiSE-FT blend side by side, and exports the result. The commands stand in `conf/demo.yaml`; each is printed before it
runs. `data_folder=FOLDER` adapts to the user's own pairs instead: tar shards, a table (.jsonl, .csv, .tsv) beside its
images, or images with same-stem .txt captions.
"""

from __future__ import annotations

import importlib
import shlex
import shutil
import time
from pathlib import Path

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.initialize import initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape

from medclip.config import CONF, output_folder, verb
from medclip.data.make_shards import make_shards
from medclip.data.sources import open_sources
from medclip.types import UserError

_TABLES = (".jsonl", ".csv", ".tsv", ".parquet")


def demo(cfg: DictConfig) -> Path:
    """Run the demo's commands; returns the path of the report.

    Raises:
        UserError: the folder of own pairs holds none, or a step's own complaint.
    """
    began = time.monotonic()
    folder = output_folder(cfg)
    for name in ("shards", "base", "adapted", "wiseft", "evaluation", "export"):
        shutil.rmtree(folder / name, ignore_errors=True)  # of an earlier demo, which `overwrite` gave up
    console = Console(highlight=False)
    if cfg.data_folder is None:
        commands = cfg.commands
    else:
        OmegaConf.update(cfg, "own", own_source(Path(str(cfg.data_folder)).expanduser()), force_add=True)
        commands = cfg.own_commands
    for kind, parts in cfg.phantoms.items():
        for part, options in parts.items():
            console.print(f"[bold]writing {options.samples} generated pairs: {kind}, {part}[/]")
            source = open_sources([{"phantoms": {"kind": kind, **options}}])[0]
            make_shards(source, folder / "shards" / f"{kind}-{part}", samples_per_shard=300, processes=2)
    steps = [shlex.split(str(command)) for command in commands]
    for number, (name, *overrides) in enumerate(steps, 1):
        words = " ".join(shlex.quote(word) for word in overrides)
        console.print(f"\n[bold]{number}/{len(steps)}[/]  [cyan]$ medclip {name} {escape(words)}[/]", soft_wrap=True)
        run(name, overrides)
    report = folder / "report.html"
    shutil.copyfile(folder / "evaluation" / "report.html", report)
    console.print(f"\n[bold]done in {(time.monotonic() - began) / 60:.1f} minutes[/]; open {report}")
    return report


def run(name: str, overrides: list[str]) -> None:
    """What `medclip NAME OVERRIDES` does, in this process."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(name, overrides)
    getattr(importlib.import_module(f"medclip.{name}"), name)(cfg)


def own_source(folder: Path) -> str:
    """The source of a folder of pairs, as an override's value without its closing brace.

    Raises:
        UserError: no such folder, or nothing in it that could be pairs.
    """
    if not folder.is_dir():
        raise UserError(
            f"data_folder={folder} is no folder: name one with shards, a table, or images with .txt captions"
        )
    tables = sorted(path for path in folder.iterdir() if path.suffix in _TABLES)
    if any(folder.rglob("*.tar")):
        source = f"urls: {_quoted(folder / '**' / '*.tar')}"
    elif tables:
        source = f"table: {_quoted(tables[0])}"
    elif any(folder.rglob("*.txt")):
        source = f"folder: {_quoted(folder)}"
    else:
        raise UserError(
            f"data_folder={folder} holds no pairs: put tar shards there, a {', '.join(_TABLES)} table with image and "
            "caption columns, or images with same-stem .txt captions"
        )
    return source


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


main = verb("demo")(demo)

if __name__ == "__main__":
    main()

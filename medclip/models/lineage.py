"""Where a model's weights come from: the lineage that a checkpoint or an exported folder carries, else a name.

`medclip.callbacks.lineage` writes the lineage of a run; here it is read back, so that what grows from a model keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import RepoCard
from open_clip.pretrained import get_pretrained_cfg

from medclip.models.build import plain
from medclip.models.weights import read_checkpoint
from medclip.types import UserError

LINEAGE = "lineage.json"


def read_lineage(where: str) -> dict[str, Any] | None:
    """The lineage in one of our checkpoints (.ckpt), or beside the weights of a folder; None where there is none."""
    path = Path(where.removeprefix("local-dir:")).expanduser()
    found: Any = None
    if path.suffix == ".ckpt" and path.is_file():
        found = read_checkpoint(path).get("lineage")
    elif (path / LINEAGE).is_file():
        try:
            found = json.loads((path / LINEAGE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path / LINEAGE} is no JSON ({error}): get it again, or remove it") from error
    return dict(found) if isinstance(found, Mapping) else None


def write_lineage(lineage: Mapping[str, Any] | None, folder: Path) -> None:
    """Write `lineage.json` into `folder`; nothing where nothing is known."""
    if lineage is not None:
        (folder / LINEAGE).write_text(json.dumps(lineage, indent=1, ensure_ascii=False), encoding="utf-8")


def parents(starts: Iterable[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """What a run starts from.

    Args:
        starts: `{role, architecture, pretrained}` each, as in a model's config; one without `pretrained` says nothing.

    Returns:
        `{role, name, hub, licence, lineage}` of each: `hub` is a repository's name where it is one, `licence` as its
        card says where that is on this machine, `lineage` its own.
    """
    found: list[dict[str, Any]] = []
    for start in starts:
        pretrained = start and start.get("pretrained")
        words = pretrained if isinstance(pretrained, Mapping) else start  # `model.init` may hold load_clip's own words
        new = not isinstance(pretrained, str | Mapping)  # nothing, or a part that starts anew (`model.types`)
        if not start or new or not words or not words.get("pretrained"):
            continue
        about = describe(words.get("architecture"), str(words["pretrained"]))
        found.append({"role": start.get("role", "weights"), **about})
    return found


def describe(architecture: Any, pretrained: str) -> dict[str, Any]:
    """`{name, hub, licence, lineage}` of weights that `load_clip(architecture, pretrained)` would take."""
    path = Path(pretrained.removeprefix("local-dir:")).expanduser()
    hub: str | None = None
    lineage = None
    name = pretrained
    if pretrained.startswith("hf-hub:"):
        hub = pretrained.removeprefix("hf-hub:")
    elif path.exists():
        lineage = read_lineage(pretrained)
    elif isinstance(architecture, str):
        name = f"{architecture} {pretrained}"
        entry = get_pretrained_cfg(architecture, pretrained)
        # "org/name/" or "org/name/file"
        hub = "/".join(str(entry.get("hf_hub") or "").split("/")[:2]) or None
    card = try_to_load_from_cache(hub, "README.md") if hub else path / "README.md"
    return {"name": name, "hub": hub, "licence": _licence(card), "lineage": plain(lineage)}


def _licence(card: Any) -> str | None:
    """Of a model card's front matter."""
    try:
        content = Path(card).read_text(encoding="utf-8")
        data: ModelCardData = RepoCard(content, ignore_metadata_errors=True).data  # type: ignore[assignment]
    except (OSError, TypeError, ValueError):  # no card, or none that can be read
        return None
    licence = data.get("license_name") or data.get("license")
    return str(licence) if licence else None

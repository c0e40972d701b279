"""What a model card tells of a lineage (`medclip.callbacks.lineage`): data, licences, what it grew from, settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def training(lineage: Mapping[str, Any]) -> Iterator[str]:
    """Data, base and settings: of this run first, then of those it grew from."""
    trained = list(runs(lineage))
    if blend := lineage.get("blend"):
        yield (
            f"## Blend\n\nWeights on the line from {_called(blend['base'])} (0) to "
            f"{_called(blend['checkpoint'])} (1), at {blend['alpha']:g} (WiSE-FT, arXiv 2109.01903)."
        )
    yield "## Data\n\n" + ("\n\n".join(_data(run) for run in trained) if trained else "Not known.")
    if bases := origins(lineage):
        yield "## Grown from\n\n" + "\n".join(_parent(parent) for parent in bases)
    if trained:
        yield "## Training\n\n" + "\n\n".join(_settings(run) for run in trained)


def _data(run: Mapping[str, Any]) -> str:
    header = ["source", "where", "selection", "samples", "passes", "left out", "licences"]
    rows = [
        [
            str(source["name"]),
            f"`{_where(source['config'])}`",
            _selection(source["config"]),
            f"{source['samples']:,}",
            f"{source['weight']:g}",
            _counts(source["left_out"]) or "0",
            _licences(source),
        ]
        for source in run["sources"]
    ]
    seen = run.get("seen") or {}
    passed = f"{seen.get('samples', 0):,} samples seen in {seen.get('steps', 0):,} steps"
    return f"""Run `{run["name"]}`: {passed}. Not usable: {_counts(seen.get("skipped") or {}) or "none"}.

{table(header, rows)}

Digest of the keys, in any order (sum of their SHA-256 modulo 2^256): `{run["keys"]}`"""


def _where(config: Mapping[str, Any]) -> str:
    kind = next((k for k in ("urls", "table", "folder", "phantoms", "slides") if k in config), None)
    value = config.get(kind or "")
    if isinstance(value, Mapping):
        return f"{kind}: " + ", ".join(f"{k}={v}" for k, v in value.items())
    return "::".join(map(str, value)) if isinstance(value, list) else str(value)


def _selection(config: Mapping[str, Any]) -> str:
    words = [f"{key}: {config[key]}" for key in ("filter", "split", "keep") if config.get(key)]
    return f"`{'; '.join(words)}`" if words else "all"


def _licences(source: Mapping[str, Any]) -> str:
    counted = _counts(source["licences"]) if source.get("licences") is not None else "not counted"
    stated = source.get("licence")
    return f"{stated} (as stated); {counted}" if stated else counted


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _parent(parent: Mapping[str, Any]) -> str:
    where = f" ([{parent['hub']}](https://huggingface.co/{parent['hub']}))" if parent.get("hub") else ""
    licence = parent.get("licence") or "not known here"
    return f"- {parent['role']}: `{parent['name']}`{where}; licence: {licence}"


def _called(parent: Mapping[str, Any]) -> str:
    """A run of ours by its name: all their checkpoints have the same."""
    own = parent.get("lineage") or {}
    return f"run `{own['name']}`" if "name" in own else f"`{parent['name']}`"


def _settings(run: Mapping[str, Any]) -> str:
    how = run["training"]
    code = (run.get("code") or [{}])[-1]
    commit = (
        f"{code['git_commit'][:12]}{' with changes' if code.get('git_changed') else ''}" if "git_commit" in code else ""
    )
    packages = code.get("packages") or {}
    starts = [f"{parent['role']} of {_called(parent)}" for parent in run.get("parents", [])]
    lines = {
        "started from": ", ".join(starts) or "random weights",
        "losses": ", ".join(f"{name} × {how['weights'].get(name, 1):g}" for name in how["losses"]),
        "adapted by": ", ".join(how["adapt"]) or "nothing",
        "trainable": f"{how['trainable'] / 1e6:.1f} of {how['parameters'] / 1e6:.1f} million parameters",
        "optimiser": f"{', '.join(how['optimizer'])}, lr {how['lr']:g}, weight decay {how['weight_decay']:g}",
        "batch": f"{how['batch']}; ranks: {how['ranks']}, batches accumulated: {how['accumulated']}",
        "steps": f"{(run.get('seen') or {}).get('steps', 0):,} of {how['steps']:,}",
        "precision": how["precision"],
        "seed": how["seed"],
        "code": ", ".join(filter(None, [commit, *(f"{k} {v}" for k, v in packages.items())])),
    }
    return f"Run `{run['name']}`, {run['started']}:\n\n" + "\n".join(
        f"- {key}: {value}" for key, value in lines.items()
    )


def runs(lineage: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Every training that had a part in it, the last first."""
    if lineage is None:
        return
    if "blend" in lineage:
        seen = set()
        for end in ("checkpoint", "base"):
            for run in runs((lineage["blend"][end] or {}).get("lineage")):
                if (key := (run["name"], run["keys"], run["started"])) not in seen:
                    seen.add(key)
                    yield run
        return
    yield lineage
    for parent in lineage.get("parents", []):
        yield from runs(parent.get("lineage"))


def origins(lineage: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """What all of them started from: those that no run of ours made, and whose name says all there is."""
    found = [parent for run in runs(lineage) for parent in run.get("parents", [])]
    if blend := (lineage or {}).get("blend"):
        found += [{"role": "weights", **blend[end]} for end in ("checkpoint", "base")]
    return list({str(parent["name"]): parent for parent in found if not parent.get("lineage")}.values())


def hub_datasets(run: Mapping[str, Any]) -> Iterator[str]:
    """org/name of data on Hugging Face's hub."""
    for source in run["sources"]:
        urls = source["config"].get("urls") or []
        for url in [urls] if isinstance(urls, str) else urls:
            for part in str(url).split("::"):
                words = part.removeprefix("hf://datasets/").split("/")
                if part.startswith("hf://datasets/") and len(words) > 1:
                    yield f"{words[0]}/{words[1]}"


def table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )

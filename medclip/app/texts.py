"""Prompts to vectors, and captions that a patch may be compared with."""

from __future__ import annotations

import csv
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from medclip.app.lru import Lru
from medclip.infer.zeroshot import embed_texts
from medclip.types import DualEncoder, UserError

_COLUMNS = ("caption", "text", "title")
_MOST_CHARACTERS = 2000


class Texts:
    """The text towers.

    Args:
        models: CLIPs by name, in evaluation mode.
    """

    def __init__(self, models: Mapping[str, DualEncoder]) -> None:
        self.models = models
        self._locks = {name: threading.Lock() for name in models}  # a tower may keep state while it computes
        self._kept: Lru[tuple[str, str], torch.Tensor] = Lru(64_000_000, lambda vector: vector.nbytes)

    def vector(self, model: str, prompt: str) -> torch.Tensor:
        """float32 (d,), unit norm."""

        def make() -> torch.Tensor:
            with self._locks[model]:
                return embed_texts(self.models[model], [prompt])[0].contiguous()

        return self._kept.get((model, prompt), make)

    def dim(self, model: str) -> int:
        return len(self.vector(model, "tissue"))


@dataclass(frozen=True)
class Captions:
    """Captions and their vectors.

    Args:
        texts: the captions.
        vectors: float16 (m, d), unit norm, by model.
    """

    texts: list[str]
    vectors: Mapping[str, torch.Tensor]

    def nearest(self, model: str, feature: torch.Tensor, count: int) -> list[tuple[str, float]]:
        """The captions most like a patch, (d,), with their cosines."""
        if not self.texts:
            return []
        scores = self.vectors[model].float() @ feature.float()
        found = scores.topk(min(count, len(scores)))
        return [(self.texts[i], float(value)) for value, i in zip(found.values, found.indices.tolist(), strict=True)]


def embed_captions(texts: list[str], models: Mapping[str, DualEncoder]) -> Captions:
    """With every model's text tower."""
    return Captions(texts, {name: embed_texts(model, texts).half() for name, model in models.items()} if texts else {})


def read_captions(path: str | Path, most: int) -> list[str]:
    """The first captions of a table (.csv, .tsv, .parquet; a column caption, text or title), each once.

    Raises:
        UserError: it cannot be read, or has no such column.
    """
    file = Path(path).expanduser()
    try:
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            columns = pq.read_schema(file).names
            name = _column(file, columns)
            rows: list[object] = []
            for batch in pq.ParquetFile(file).iter_batches(4096, columns=[name]):
                rows += batch.column(0).to_pylist()
                if len(rows) >= most:
                    break
        else:
            with file.open(newline="", encoding="utf-8-sig") as stream:
                reader = csv.DictReader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
                name = _column(file, reader.fieldnames or [])
                rows = [row[name] for row, _ in zip(reader, range(most), strict=False)]
    except UserError:
        raise
    except Exception as error:  # readers of tables raise anything
        raise UserError(f"captions={path}: cannot be read ({' '.join(str(error).split())[:150]})") from None
    cut = [" ".join(str(row).split())[:_MOST_CHARACTERS] for row in rows[:most] if row]
    return list(dict.fromkeys(text for text in cut if text))


def _column(file: Path, columns: Sequence[str]) -> str:
    found = next((name for name in _COLUMNS if name in columns), None)
    if found is None:
        raise UserError(
            f"captions={file}: has the columns {', '.join(columns)}, none of them {', '.join(_COLUMNS)}: rename one"
        )
    return found

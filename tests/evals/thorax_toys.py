"""Grey pictures of three bands, each bright where a finding is present, and models that read them: a classifier whose
logits are known, and a CLIP that understands "no"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medclip.types import Batch, Preprocess

FINDINGS = ("Effusion", "Lung_Nodule", "Edema")
WORDS = ("effusion", "nodule", "edema", "no", "without", "lung")


def bands(image: Tensor) -> Tensor:
    """Brightness of the three bands of uint8 (b, 3, h, w), about -0.1 where absent and 0.1 where present."""
    return torch.stack([part.float().mean(dim=(1, 2, 3)) for part in image.tensor_split(3, dim=2)], dim=1) / 255 - 0.5


class FindingSet:
    """`EvalSet`'s interface: three pictures a patient, batches padded to full size, some labels unknown, some samples
    without any, two that could not be read."""

    def __init__(
        self,
        patients: int = 20,
        seed: int = 0,
        unknown: float = 0.1,
        unlabelled: int = 0,
        classes: Sequence[str] = FINDINGS,
        size: int = 32,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.classes = tuple(classes)
        self.rows: list[tuple[str, np.ndarray, np.ndarray, str]] = []
        for i in range(3 * patients + unlabelled):
            truth = (rng.random(len(self.classes)) < 0.35).astype(np.float32)
            pixels = np.full((size, size), 128.0)
            for c, part in enumerate(np.array_split(np.arange(size), len(self.classes))):
                pixels[part] += 25 * (2 * truth[c] - 1) + rng.normal(0, 16)
            image = np.clip(pixels + rng.normal(0, 6, (size, size)), 0, 255).astype(np.uint8)
            label = np.where(rng.random(len(truth)) < unknown, np.nan, truth) if unknown else truth
            if i >= 3 * patients:
                label = np.full(len(truth), np.nan)
            self.rows.append((f"s{seed}-{i}", np.stack([image] * 3), label.astype(np.float32), f"{seed}:{i // 3}"))
        self.bad = [(f"bad-{i}", "broken image", "cut short") for i in range(2)]

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, preprocess: Preprocess, batch_size: int, workers: int) -> Iterator[Batch]:
        for start in range(0, len(self.rows), batch_size):
            part = self.rows[start : start + batch_size]
            image = torch.zeros(batch_size, *part[0][1].shape, dtype=torch.uint8)
            label = torch.full((batch_size, len(self.classes)), torch.nan)
            image[: len(part)] = torch.from_numpy(np.stack([row[1] for row in part]))
            label[: len(part)] = torch.from_numpy(np.stack([row[2] for row in part]))
            meta: list[dict[str, Any]] = [{"label": None, "captions": [], "group": row[3], "raw": {}} for row in part]
            yield {"image": image, "label": label, "key": [row[0] for row in part], "meta": meta}


class BandClassifier(nn.Module):
    """Logits 20 x brightness of the bands with `skill` 1, a hash of the picture with 0."""

    tokenizer = None

    def __init__(self, skill: float = 1.0, classes: Sequence[str] = FINDINGS) -> None:
        super().__init__()
        self.skill = skill
        self.preprocess = Preprocess(size=(32, 32))
        self.description = {"kind": "classifier", "classes": list(classes)}
        self.places = [i for i, name in enumerate(FINDINGS) if name in classes]
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.seen = 0

    def forward(self, batch: Batch) -> Tensor:
        assert "image" in batch
        self.seen += len(batch["image"])
        seen = bands(batch["image"])
        noise = 0.1 * torch.sin(seen.sum(dim=1, keepdim=True) * torch.tensor([1e4, 2e4, 3e4]))
        return self.scale * (self.skill * seen + (1 - self.skill) * noise)[:, self.places]


class FindingTokenizer:
    """Word numbers; unknown words are 0."""

    context_length = 8

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in enumerate([texts] if isinstance(texts, str) else texts):
            for place, word in enumerate(text.lower().replace("_", " ").split()[: self.context_length]):
                ids[row, place] = WORDS.index(word) + 1 if word in WORDS else 0
        return ids


class FindingClip(nn.Module):
    """Reads bands, names findings; "no" and "without" turn a text round. `skill` as in `BandClassifier`."""

    def __init__(self, skill: float = 1.0) -> None:
        super().__init__()
        self.skill = skill
        self.preprocess = Preprocess(size=(32, 32))
        self.tokenizer = FindingTokenizer()
        self.register_buffer("words", torch.cat([torch.zeros(1, 3), torch.eye(3), torch.zeros(3, 3)]))

    @property
    def device(self) -> torch.device:
        return self.words.device

    def encode_image(self, image: Tensor) -> Tensor:
        seen = bands(image)
        noise = 0.1 * torch.sin(seen.sum(dim=1, keepdim=True) * torch.tensor([1e4, 2e4, 3e4]))
        return nn.functional.normalize(self.skill * seen + (1 - self.skill) * noise, dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        said = self.words[text].sum(dim=1)
        turned = ((text == WORDS.index("no") + 1) | (text == WORDS.index("without") + 1)).any(dim=1)
        return nn.functional.normalize(torch.where(turned[:, None], -said, said) + 1e-4, dim=-1)


def load_toy(pretrained: str) -> nn.Module:
    """`conf/evaluate.yaml`'s `load`: KIND:SKILL, e.g. clip:0.5."""
    kind, _, skill = pretrained.partition(":")
    return {"clip": FindingClip, "classifier": BandClassifier}[kind](float(skill))

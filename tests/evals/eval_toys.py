"""A set of coloured squares and an encoder that reads colours: small, real, and with known answers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from medclip.types import Batch, Preprocess

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 40), "blue": (40, 40, 220)}
WORDS = [*COLOURS, "crimson", "square", "a", "of", "picture", "dark", "light"]


class ColourTokenizer:
    """Word numbers; unknown words are 0."""

    context_length = 8

    def __call__(self, texts: str | list[str]) -> Tensor:
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in enumerate([texts] if isinstance(texts, str) else texts):
            for place, word in enumerate(text.lower().replace(".", "").split()[: self.context_length]):
                ids[row, place] = WORDS.index(word) + 1 if word in WORDS else 0
        return ids


class ColourClip(nn.Module):
    """Knows colours with `skill` 1, nothing with 0. Counts what its towers are given."""

    def __init__(self, skill: float = 1.0) -> None:
        super().__init__()
        self.skill = skill
        self.preprocess = Preprocess(size=(32, 32))
        self.tokenizer = ColourTokenizer()
        self.images = self.texts = 0
        words = torch.zeros(len(WORDS) + 1, 3)
        for i, colour in enumerate([*COLOURS.values(), COLOURS["red"]]):
            words[i + 1] = torch.tensor(colour) / 255 - 0.4
        self.register_buffer("words", words)

    @property
    def device(self) -> torch.device:
        return self.words.device

    def encode_image(self, image: Tensor) -> Tensor:
        self.images += len(image)
        mean = image.float().mean(dim=(2, 3)) / 255 - 0.4
        noise = torch.sin(mean.sum(dim=1, keepdim=True) * torch.tensor([1e4, 2e4, 3e4]))
        return nn.functional.normalize(self.skill * mean + (1 - self.skill) * noise, dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        self.texts += len(text)
        return nn.functional.normalize(self.words[text].sum(dim=1) + 1e-3, dim=-1)


class ColourSet:
    """`EvalSet`'s interface: three squares a patient, batches padded to full size, some samples unusable."""

    def __init__(self, patients: int = 12, unlabelled: int = 0, seed: int = 0, size: int = 32) -> None:
        rng = np.random.default_rng(seed)
        self.rows = []
        for i in range(3 * patients + unlabelled):
            name = str(rng.choice(list(COLOURS)))
            shade = rng.integers(-40, 40)
            pixels = np.clip(np.array(COLOURS[name]) + shade + rng.integers(-9, 9, (size, size, 3)), 0, 255)
            tone = "dark" if shade < 0 else "light"
            captions = [f"a {tone} {name} square", f"picture of {name} <b>{tone}</b>"]
            meta = {"label": name, "captions": captions, "group": f"patient-{i // 3}", "raw": {}}
            if i >= 3 * patients:
                meta |= {"label": None, "captions": []}
            self.rows.append((f"key-{i}", pixels.astype(np.uint8).transpose(2, 0, 1), meta))
        self.bad = [(f"bad-{i}", "broken image", "cut short") for i in range(2)]
        self.classes = ()

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, preprocess: Preprocess, batch_size: int, workers: int) -> Iterator[Batch]:
        for start in range(0, len(self.rows), batch_size):
            part = self.rows[start : start + batch_size]
            image = torch.zeros(batch_size, 3, *part[0][1].shape[1:], dtype=torch.uint8)
            image[: len(part)] = torch.from_numpy(np.stack([pixels for _, pixels, _ in part]))
            yield {"image": image, "key": [key for key, _, _ in part], "meta": [meta for _, _, meta in part]}


def load_colour_clip(pretrained: str) -> ColourClip:
    """`conf/evaluate.yaml`'s `load`: a checkpoint's name is its skill."""
    return ColourClip(float(pretrained))

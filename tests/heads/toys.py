"""Small questions: an encoder of eight states, without any word vectors from outside."""

from __future__ import annotations

from typing import Any

import torch

from medclip.models.question_rnn import QuestionRnn

WORDS = ["is", "there", "a", "lung", "what", "organ", "this"]


def encoder(**options: Any) -> QuestionRnn:
    return QuestionRnn(WORDS, **{"embedding": 6, "hidden": 8, "length": 5, **options})


def texts(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, len(WORDS) + 2, (16, 5), generator=generator)[:rows]


def objects(rows: int, count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(16, count, 6, generator=torch.Generator().manual_seed(seed))[:rows]

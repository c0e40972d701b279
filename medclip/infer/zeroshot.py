"""Zero-shot classification by prompt ensembles (Radford et al. 2021, arXiv 2103.00020, section 3.1.4).

A class is described by every template filled with every one of its names; its classifier is the mean of the unit-norm
text features, brought back to unit norm. One template alone gives a classifier too, and how far these differ says how
much a score owes to the choice of words: the best prompt of a set is no fair number, the spread is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from medclip.types import DualEncoder, UserError

TEXT_BATCH = 256
LOGIT_SCALE = 100.0  # what OpenAI's and most open_clip models end at


def own_logit_scale(encoder: DualEncoder) -> float:
    """What the model multiplies cosines by, exp of its `logit_scale`; 100 where it has none."""
    scale = getattr(encoder, "logit_scale", None)
    return LOGIT_SCALE if scale is None else float(scale.detach().double().exp())


def fill(template: str, name: str) -> str:
    """A template with its slot filled: `{c}` as CLIP_benchmark writes it, or `{}` as OpenAI's lists do.

    Raises:
        UserError: the template has no slot, so every class would get the same prompt.
    """
    if "{c}" not in template and "{}" not in template:
        raise UserError(f"template {template!r} has no place for the class name: write {{c}} where it belongs")
    return template.replace("{c}", name).replace("{}", name)


@torch.inference_mode()
def embed_texts(encoder: DualEncoder, texts: Sequence[str], batch_size: int = TEXT_BATCH) -> Float[Tensor, "m d"]:
    """Unit-norm features of texts, float32 on the CPU; the same string is encoded once."""
    unique = list(dict.fromkeys(texts))
    rows = [
        encoder.encode_text(encoder.tokenizer(unique[i : i + batch_size]).to(encoder.device)).float().cpu()
        for i in range(0, len(unique), batch_size)
    ]
    place = {text: i for i, text in enumerate(unique)}
    return torch.cat(rows)[[place[text] for text in texts]]


def prompt_features(
    encoder: DualEncoder, classes: Mapping[str, Sequence[str]], templates: Sequence[str]
) -> list[Float[Tensor, "t names d"]]:
    """For each class the features of all its prompts, template by name."""
    prompts = [[fill(t, name) for t in templates for name in names] for names in classes.values()]
    features = embed_texts(encoder, [p for own in prompts for p in own])
    return [part.unflatten(0, (len(templates), -1)) for part in features.split([len(own) for own in prompts])]


def ensemble(prompts: Sequence[Float[Tensor, "t names d"]]) -> Float[Tensor, "c d"]:
    """One classifier row a class: the renormalised mean over all its templates and names."""
    means = torch.stack([own.flatten(0, 1).mean(dim=0) for own in prompts])
    return torch.nn.functional.normalize(means, dim=-1)


def by_template(prompts: Sequence[Float[Tensor, "t names d"]]) -> Float[Tensor, "t c d"]:
    """One classifier a template: the renormalised mean over the names of each class."""
    means = torch.stack([own.mean(dim=1) for own in prompts], dim=1)
    return torch.nn.functional.normalize(means, dim=-1)

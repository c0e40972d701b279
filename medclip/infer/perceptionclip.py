"""PerceptionCLIP: infer a picture's circumstances, then classify given these (An et al. 2024, arXiv 2308.01313).

Attributes z do not depend on the class: the stain, the magnification. Each has values, each value descriptions; a state
is one value of every attribute. A class y in state z is described by "TEMPLATE(y), DESCRIPTION." and w_yz is the
renormalised mean over the state's descriptions. With f(y, z) = s x·w_yz, s being the model's own scale,

    p(y | x, z) = e^f(y,z) / sum over y' of e^f(y',z)
    p(z | x)    = sum over y of e^(f(y,z)/t) / sum over z' and y of e^(f(y,z')/t)      "ClassAttr", with y
                = e^(g(z)/t) / sum over z' of e^(g(z')/t)                              "PureAttr", without y
    p(y | x)    = sum over z of p(z | x) p(y | x, z)

where g(z) = s x·w_z is of the same texts with a word for any class ("tissue"). The temperature t is the intervention on
the attributes: 1 takes the model at its word (ClassAttr is then the sum over z of the joint softmax), a larger one
trusts it less; without end, every state counts alike. It is no parameter to choose on the judged samples. With one
state this is plain zero-shot classification. Formulas as in the authors' public code; exponentials by logsumexp.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from medclip.infer.zeroshot import embed_texts, fill
from medclip.types import DualEncoder, UserError

Variant = Literal["with_y", "without_y"]
Factors = Mapping[str, Mapping[str, Sequence[str]]]  # attribute -> value -> descriptions; "" says nothing


@dataclass(frozen=True)
class State:
    """One value of every attribute, and how texts put it: descriptions, of which "" says nothing."""

    values: tuple[str, ...]
    texts: tuple[str, ...]


def parse_factors(factors: Mapping[str, Mapping[str, str | Sequence[str]]], name: str) -> Factors:
    """Attributes from a config, `{stain: {pale: [pale stain, weakly stained], usual: ""}}`; a name goes for messages.

    Raises:
        UserError: no attribute, or one without values or descriptions.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for factor, values in factors.items():
        if not isinstance(values, Mapping) or not values:
            raise UserError(f"{name}.{factor} is {values!r}: write {{value: [description, …], …}}")
        found[str(factor)] = {
            str(value): [texts] if isinstance(texts, str) else [str(text) for text in texts]
            for value, texts in values.items()
        }
        if bare := [value for value, texts in found[str(factor)].items() if not texts]:
            raise UserError(f"{name}.{factor}.{bare[0]} has no description: write one, or '' for none")
    if not found:
        raise UserError(f"{name} is empty: name an attribute, e.g. {{stain: {{pale: pale stain, usual: ''}}}}")
    return found


def states(factors: Factors) -> list[State]:
    """All combinations of the attributes' values, the last attribute changing first.

    The descriptions of a state are all combinations of its values' descriptions, joined by ", "; empty ones fall out.
    """
    found = []
    for values in itertools.product(*(own for own in factors.values())):
        described = [factors[factor][value] for factor, value in zip(factors, values, strict=True)]
        texts = (", ".join(text for text in parts if text) for parts in itertools.product(*described))
        found.append(State(tuple(values), tuple(dict.fromkeys(texts))))
    return found


def compose(template: str, name: str, description: str) -> str:
    """`TEMPLATE(name), description.`, whatever full stop the template ends in."""
    text = fill(template, name).rstrip(" .")
    return f"{text}, {description}." if description else f"{text}."


@dataclass(frozen=True)
class Perception:
    """A classifier that perceives first.

    Args:
        joint: (|Z|, |Y|, d) unit-norm, of every class in every state.
        pure: (|Z|, d) unit-norm, of the states with a word for any class.
        variant: how states are inferred.
        temperature: of p(z | x).
        scale: of cosines.
    """

    joint: Float[Tensor, "z y d"]
    pure: Float[Tensor, "z d"]
    variant: Variant = "with_y"
    temperature: float = 1.0
    scale: float = 100.0

    def log_states(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n z"]:
        """log p(z | x) of unit-norm image features, float64."""
        features = features.double()
        if self.variant == "without_y":
            odds = self.scale * features @ self.pure.double().T / self.temperature
        else:
            odds = (self._odds(features) / self.temperature).logsumexp(dim=2)
        return odds.log_softmax(dim=1)

    def log_classes(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n y"]:
        """log p(y | x), float64: logits that are calibrated as they are."""
        return self.given(features, self.log_states(features))

    def given(self, features: Float[Tensor, "n d"], log_states: Float[Tensor, "n z"]) -> Float[Tensor, "n y"]:
        """log p(y | x) for states that are known, or believed, in place of inferred (an intervention on z).

        Args:
            features: unit-norm.
            log_states: log p(z | x), each row's exponentials summing to 1; -inf where a state is ruled out.
        """
        conditional = self._odds(features.double()).log_softmax(dim=2)
        return (log_states[:, :, None] + conditional).logsumexp(dim=1)

    def _odds(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n z y"]:
        return self.scale * torch.einsum("nd,zyd->nzy", features, self.joint.double())


def marginal(log_states: Float[Tensor, "n z"], known: Sequence[State], factor: int) -> dict[str, Float[Tensor, " n"]]:
    """p(value | x) of one attribute: value -> the sum over the states that have it."""
    values = list(dict.fromkeys(state.values[factor] for state in known))
    probability = log_states.exp()
    return {v: probability[:, [i for i, s in enumerate(known) if s.values[factor] == v]].sum(dim=1) for v in values}


@torch.inference_mode()
def perception(
    encoder: DualEncoder,
    classes: Mapping[str, Sequence[str]],
    template: str,
    known: Sequence[State],
    *,
    generic: str = "object",
    variant: Variant = "with_y",
    temperature: float = 1.0,
    scale: float = 100.0,
) -> Perception:
    """The classifier of `classes` (class -> its names, over which texts are averaged, too) in the states `known`.

    Args:
        encoder: a CLIP.
        classes: label -> names.
        template: with `{c}` or `{}` where the name goes.
        known: the states.
        generic: a word for any class.
        variant: with_y or without_y.
        temperature: above 0.
        scale: of cosines.

    Raises:
        UserError: an unknown variant, or a temperature that is none.
    """
    if variant not in get_args(Variant):
        raise UserError(f"variant={variant}: choose {' or '.join(get_args(Variant))}")
    if not temperature > 0:
        raise UserError(f"temperature={temperature}: give a number above 0")
    words = [*classes.values(), [generic]]
    prompts = [[[compose(template, n, text) for n in names for text in s.texts] for names in words] for s in known]
    flat = embed_texts(encoder, [prompt for own in prompts for each in own for prompt in each])
    parts = iter(flat.split([len(each) for own in prompts for each in own]))
    means = torch.stack([torch.stack([next(parts).mean(dim=0) for _ in words]) for _ in known])
    unit = torch.nn.functional.normalize(means, dim=-1)
    return Perception(unit[:, :-1], unit[:, -1], variant, temperature, scale)

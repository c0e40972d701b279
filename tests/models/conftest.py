"""Tiny real models: a ViT, a SigLIP-like one, and one with a BERT text tower, whose files are written here."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

WORDS = [
    "a",
    "the",
    "of",
    "and",
    "with",
    "no",
    "left",
    "right",
    "lung",
    "liver",
    "x",
    "ray",
    "ct",
    "mri",
    "effusion",
    "nodule",
    "normal",
    "image",
    "stain",
    "cells",
    "##s",
    "##ed",
]
VISION = {"image_size": 32, "patch_size": 16, "layers": 2, "width": 64, "head_width": 32}


def _vit() -> dict:
    text = {"context_length": 16, "vocab_size": 49408, "layers": 1, "width": 32, "heads": 2}
    return {"embed_dim": 32, "vision_cfg": dict(VISION), "text_cfg": text}


def _siglip() -> dict:
    cfg = _vit() | {"custom_text": True, "init_logit_bias": -10.0}
    cfg["text_cfg"] |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    return cfg


@pytest.fixture
def vit_cfg() -> dict:
    return _vit()


@pytest.fixture
def siglip_cfg() -> dict:
    return _siglip()


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a Hugging Face text model's repository holds, small: `config.json` and a WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz0123456789-.,"]
    vocabulary += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64, **special})
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "bert",
                "architectures": ["BertModel"],
                "vocab_size": len(dict.fromkeys(vocabulary)),
                "max_position_embeddings": 64,
                "pad_token_id": 0,
                **sizes,
            }
        )
    )
    return folder


@pytest.fixture
def bert_cfg(bert_folder: Path) -> dict:
    text = {
        "hf_model_name": str(bert_folder),
        "hf_tokenizer_name": str(bert_folder),
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": 24,
    }
    return {"embed_dim": 32, "vision_cfg": dict(VISION), "text_cfg": text}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to connect anywhere fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"tried to reach the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(params=["vit", "siglip", "bert"])
def any_cfg(request: pytest.FixtureRequest) -> dict:
    """Each of the three families in turn."""
    return request.getfixturevalue(f"{request.param}_cfg")

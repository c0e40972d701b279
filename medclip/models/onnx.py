"""A model as ONNX, to run without torch: images or token ids in, unit-norm features or logits out.

    image.onnx       `image` float32 (batch, 3, h, w), normalised -> `features` float32 (batch, d), unit-norm
    text.onnx        `text` int64 (batch, context) -> `features` float32 (batch, d), unit-norm
    onnx.json        inputs, outputs, logit scale and bias, how images are made, which tokenizer
    tokenizer.json   and what else a Hugging Face tokenizer has; CLIP's own is written in the same format

A classifier is `classifier.onnx` (`image` -> `logits`) with its classes in `onnx.json`; of a masked autoencoder the
encoder is written, `encoder.onnx` (`image` -> `tokens`, class token first, of the whole image).

Every file is run by onnxruntime at a batch of 1 and of 5 and compared with the model before it is left in place; batch
sizes are free. A CLIP's image is resized and cut as `preprocess` says, scaled to 0..1, and normalised by `mean` and
`std`; the logits of a pair are `logit_scale * cosine + logit_bias`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medclip.models.attention import plain_attention
from medclip.models.bpe import bpe_tokenizer
from medclip.models.clip import Clip
from medclip.models.hf import HF_FILES, write_files
from medclip.models.mae import Mae
from medclip.models.tokenizer import BpeTokenizer, HubTokenizer
from medclip.models.vit import Classifier
from medclip.types import Preprocess, UserError

ABOUT = "onnx.json"
OPSETS = (18, 21)  # the exporter writes 18; onnxruntime has had 21 since 1.20
TOLERANCE = 1e-4  # of any coordinate of unit-norm features
_TEXTS = ("chest X-ray: left-sided effusion", "", "H&E stain of the colon " * 40, "a", "CT of the liver, axial")


class _Call(nn.Module):
    """A function of a module's as a module: what the exporter takes."""

    def __init__(self, owner: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.owner = owner
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def write_onnx(model: Clip | Classifier | Mae, folder: Path, *, opset: int = OPSETS[0]) -> float:
    """Write `model` (float32, on the CPU) as ONNX files into `folder`; prove them.

    Args:
        model: what is written.
        folder: where to; made where it does not exist.
        opset: version of ONNX's operators.

    Returns:
        The largest difference of any output from the model's own.

    Raises:
        UserError: the extra `onnx` is not installed, or no such opset.
        RuntimeError: onnxruntime computes something else than the model.
    """
    check_onnx(opset)
    folder.mkdir(exist_ok=True)
    training = model.training
    model.eval()
    try:
        if isinstance(model, Clip):
            return _write_clip(model, folder, opset)
        name, function, output = _single(model)
        images = _images(model.preprocess)
        difference = _write_one(_Call(model, function), folder / f"{name}.onnx", "image", output, images, opset)
        about: dict[str, Any] = {name: _entry(f"{name}.onnx", "image", output, images)}
        about["preprocess"] = model.preprocess.as_dict()
        if isinstance(model, Classifier):
            about["classes"] = model.classes
        _write_about(folder, about, opset)
        return difference
    finally:
        model.train(training)


def check_onnx(opset: int) -> None:
    """Refuse what cannot be written, before anything is.

    Raises:
        UserError: the extra `onnx` is not installed, or no such opset.
    """
    if not isinstance(opset, int) or not OPSETS[0] <= opset <= OPSETS[1]:
        raise UserError(f"opset={opset}: choose {OPSETS[0]} to {OPSETS[1]}")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"onnx=true needs the extra: pip install 'medclip-adapt[onnx]' ({error})") from error


def _single(model: Classifier | Mae) -> tuple[str, Callable[[Tensor], Tensor], str]:
    if isinstance(model, Classifier):
        return "classifier", lambda image: model({"image": image}), "logits"
    return "encoder", lambda image: model.encode({"image": image}), "tokens"


def _write_clip(clip: Clip, folder: Path, opset: int) -> float:
    images = _images(clip.preprocess)
    ids = clip.tokenizer(_TEXTS)
    image = _Call(clip.net, clip.encode_image)
    text = _Call(clip.net, clip.encode_text)
    difference = max(
        _write_one(image, folder / "image.onnx", "image", "features", images, opset),
        _write_one(text, folder / "text.onnx", "text", "features", ids, opset),
    )
    bias = clip.net.logit_bias
    about = {
        "image": _entry("image.onnx", "image", "features", images),
        "text": _entry("text.onnx", "text", "features", ids),
        "logit_scale": float(clip.logit_scale.detach().exp()),
        "logit_bias": None if bias is None else float(bias.detach()),
        "preprocess": clip.preprocess.as_dict(),
        "tokenizer": _write_tokenizer(clip, folder),
    }
    _write_about(folder, about, opset)
    return difference


def _images(preprocess: Preprocess) -> Tensor:
    """Five normalised images of noise: smooth enough for towers that pool, of all brightnesses."""
    noise = torch.rand((5, 3, *preprocess.size), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (preprocess.mean, preprocess.std))
    return (noise - mean) / std


def _entry(file: str, name: str, output: str, example: Tensor) -> dict[str, Any]:
    dtype = str(example.dtype).removeprefix("torch.")
    return {"file": file, "input": name, "dtype": dtype, "shape": ["batch", *example.shape[1:]], "output": output}


def _write_about(folder: Path, about: Mapping[str, Any], opset: int) -> None:
    (folder / ABOUT).write_text(json.dumps({**about, "opset": opset}, indent=2), encoding="utf-8")


def _write_tokenizer(clip: Clip, folder: Path) -> dict[str, Any]:
    """Lay the tokenizer's files beside the towers; returns what a reader must know to use them."""
    tokenizer = clip.tokenizer
    known: dict[str, Any] = {"context_length": tokenizer.context_length}
    if isinstance(tokenizer, BpeTokenizer):
        (folder / "tokenizer.json").write_text(
            json.dumps(bpe_tokenizer(tokenizer.clean), ensure_ascii=False), encoding="utf-8"
        )
        return known | {"file": "tokenizer.json", "pad_id": 0, "keep_last": True}
    assert isinstance(tokenizer, HubTokenizer)
    texts = {name: text for name, text in (clip.description.get("files") or {}).items() if name != "config.json"}
    write_files(texts, folder)
    own: Any = tokenizer.inner.tokenizer
    if own.is_fast:  # the same as `tokenizers` reads it, also where the files are older ones (vocab.txt)
        fast = json.loads(own.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        (folder / "tokenizer.json").write_text(json.dumps(fast, ensure_ascii=False), encoding="utf-8")
    file = "tokenizer.json" if own.is_fast else next((name for name in HF_FILES if name in texts), None)
    return known | {"file": file, "pad_id": own.pad_token_id, "keep_last": True}


def _write_one(module: nn.Module, path: Path, name: str, output: str, examples: Tensor, opset: int) -> float:
    with plain_attention(), _silence():
        program = torch.onnx.export(
            module,
            (examples[:2],),  # not 1, which would be taken for a constant
            dynamo=True,
            opset_version=opset,
            input_names=[name],
            output_names=[output],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert program is not None
        program.save(str(path))
    return _compare(module, path, name, output, examples)


@torch.no_grad()
def _compare(module: nn.Module, path: Path, name: str, output: str, examples: Tensor) -> float:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    difference = 0.0
    for rows in (examples[:1], examples):
        ours = module(rows)
        theirs = torch.from_numpy(session.run([output], {name: rows.numpy()})[0])
        found = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("nan")
        scale = max(1.0, float(ours.abs().max()))  # logits and tokens are of no norm
        if not found <= TOLERANCE * scale:  # catches NaN as well
            raise RuntimeError(f"onnxruntime computes another model from {path.name}: {output} differ by {found:.1e}")
        difference = max(difference, found)
    return difference


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter tells of its passes on stdout, in warnings and in logs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

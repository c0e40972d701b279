"""`medclip serve`: the viewer. Finds slides, features and models, says where it listens, and answers until Ctrl-C."""

from __future__ import annotations

import logging
import re
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from medclip.app.auth import is_loopback
from medclip.app.features import FeatureSet, FeatureStore, find_sets
from medclip.app.limits import Limits
from medclip.app.texts import Texts, embed_captions, read_captions
from medclip.app.viewer import Viewer
from medclip.config import build, verb
from medclip.evaluate import named_checkpoints
from medclip.models.patches import fingerprint, short_name
from medclip.types import UserError
from slides.cohort import read_cohort
from slides.errors import SlideError

_MORE = "pip install 'medclip-adapt[serve]'"


@dataclass(frozen=True)
class Address:
    """Where the viewer listens, and what it demands."""

    host: str
    port: int
    token: str | None
    hosts: tuple[str, ...]

    @property
    def page(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        name = socket.gethostname() if self.host in ("0.0.0.0", "::") else name
        return f"http://{name}:{self.port}/" + (f"?token={self.token}" if self.token else "")


def serve(cfg: DictConfig) -> None:
    """Run the viewer.

    Raises:
        UserError: no slide, no model, features that are none or of another model, an address that cannot be used.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    try:
        import uvicorn

        from medclip.app.server import make_app
    except ImportError as error:
        raise UserError(f"medclip serve needs {error.name}: {_MORE}") from None
    torch.set_num_threads(1)  # requests run side by side; each by itself would only wait for the others' cores
    listening, address = listen(cfg)
    viewer = make_viewer(cfg)
    app = make_app(viewer, bound=address.host, token=address.token, hosts=address.hosts)
    _tell(viewer, address)
    # h11 alone bounds how long a header may get.
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=1024,
        h11_max_incomplete_event_size=16384,
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run(sockets=[listening])


def listen(cfg: DictConfig) -> tuple[socket.socket, Address]:
    """A socket that listens, before anything is loaded, and what it is known by.

    Raises:
        UserError: the address or port cannot be had.
    """
    host, port, token = str(cfg.host), cfg.port, cfg.token
    if not isinstance(port, int) or not 0 <= port <= 65535:
        raise UserError(f"port={port}: give a number from 0 (a free one) to 65535")
    if token not in (None, "auto") and not re.fullmatch(r"[A-Za-z0-9._~-]{8,}", str(token)):
        raise UserError("token: give 8 or more of the characters A-Z a-z 0-9 . _ ~ -, or auto")
    if token == "auto" or (token is None and not is_loopback(host)):
        token = secrets.token_urlsafe(24)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"cannot listen at {host}, port {port} ({why}): choose another host= or port=") from None
    hosts = tuple(map(str, cfg.hosts or ()))
    return listening, Address(host, listening.getsockname()[1], None if token is None else str(token), hosts)


def make_viewer(cfg: DictConfig) -> Viewer:
    """All that the viewer knows, loaded.

    Raises:
        UserError: as `serve`.
    """
    values = OmegaConf.to_container(cfg.limits)
    try:
        limits = Limits(**values)  # type: ignore[arg-type]
    except TypeError as error:
        raise UserError(f"limits: an unknown key ({error}): see `--cfg job`") from None
    source = OmegaConf.to_container(cfg.cohort) if OmegaConf.is_list(cfg.cohort) else str(cfg.cohort)
    try:
        entries = read_cohort(source, mpp=cfg.slide_mpp)  # type: ignore[arg-type]
    except SlideError as error:
        raise UserError(str(error)) from error
    checkpoints = named_checkpoints(cfg)
    models = {name: build(cfg.load, pretrained=path).eval().requires_grad_(False) for name, path in checkpoints.items()}
    clips = {name: model for name, model in models.items() if hasattr(model, "encode_text")}
    slide_models = {name: model for name, model in models.items() if hasattr(model, "predict")}
    for name in models.keys() - clips.keys() - slide_models.keys():
        raise UserError(f"{name}={checkpoints[name]} is neither a CLIP nor a slide model: the viewer has no use for it")
    texts = Texts(clips)
    makers = {name: Maker(model.encoder, None, model.dim) for name, model in slide_models.items()} | {
        name: Maker(short_name(checkpoints[name]), fingerprint(clip, clip.preprocess), texts.dim(name))
        for name, clip in clips.items()
    }
    sets = choose_sets(cfg.features, {name: makers[name] for name in models})
    captions = [] if cfg.captions is None or not clips else read_captions(str(cfg.captions), limits.captions)
    return Viewer(
        entries, FeatureStore(sets, limits.feature_bytes), texts, slide_models, embed_captions(captions, clips), limits
    )


@dataclass(frozen=True)
class Maker:
    """The model that a checkpoint's features are to be of.

    Args:
        encoder: its name, as files of features say it; None: not known.
        weights: fingerprint of its weights, likewise.
        dim: of its features.
    """

    encoder: str | None
    weights: str | None
    dim: int

    def has_made(self, one: FeatureSet, *, said: bool) -> bool:
        """Whether features may be its own: by fingerprint, else by name, which counts no more where it is `said`."""
        if self.weights and one.weights:
            return self.weights == one.weights
        return said or self.encoder is None or one.encoder == self.encoder


def choose_sets(features: Any, makers: Mapping[str, Maker]) -> dict[str, FeatureSet]:
    """The features that each model is shown with.

    Args:
        features: a folder for all, whose sets are told by their fingerprints or names; or folders by model.
        makers: by model.

    Raises:
        UserError: none fits a model, or several do.
    """
    own = {key: folder for key, folder in features.items() if folder} if OmegaConf.is_dict(features) else None
    if unknown := [key for key in own or () if key not in makers]:
        raise UserError(f"features.{unknown[0]}: there is no checkpoint {unknown[0]}; there is {', '.join(makers)}")
    chosen = {}
    for name, maker in makers.items():
        folder = features if own is None else own.get(name)
        if folder is None:
            raise UserError(
                f"no features of {name}: say features=FOLDER, or features.{name}=FOLDER for each checkpoint"
            )
        found = find_sets(str(folder))
        fitting = [one for one in found if maker.has_made(one, said=own is not None)]
        if not fitting:
            names = ", ".join(sorted({one.encoder for one in found}))
            raise UserError(
                f"features={folder}: made by {names}, while {name} is {maker.encoder} (weights {maker.weights}): "
                "extract features with it; where files say no fingerprint and it is the same model all the same, give "
                "checkpoints.NAME=PATH features.NAME=FOLDER"
            )
        if len(fitting) > 1:
            folders = " and ".join(str(one.folder) for one in fitting[:2])
            raise UserError(f"{name} has features in {folders}: give one of these folders")
        if fitting[0].dim != maker.dim:
            raise UserError(
                f"features in {fitting[0].folder} have {fitting[0].dim} numbers a patch, {name} has {maker.dim}: they "
                "were made by another model"
            )
        chosen[name] = fitting[0]
    return chosen


def _tell(viewer: Viewer, address: Address) -> None:
    console = Console()
    for name, one in viewer.store.sets.items():
        count = sum(slide in viewer.entries for slide in one.files)
        console.print(
            f"{name}: features of {count} of {len(viewer.entries)} slides, by {one.encoder}",
            markup=False,
            soft_wrap=True,
        )
    if len(viewer.captions.texts):
        console.print(f"{len(viewer.captions.texts)} captions", highlight=False)
    console.print(f"open {address.page}   (Ctrl-C ends it)", markup=False, highlight=False, soft_wrap=True)
    if not is_loopback(address.host):
        console.print(
            "It is reached from other machines, unencrypted: put a proxy with TLS before it.", highlight=False
        )
    sys.stdout.flush()


main = verb("serve")(serve)

if __name__ == "__main__":
    main()

"""`medclip serve`: what it is given fits together, or is refused in one line before anything listens for long."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from starlette.testclient import TestClient

from medclip.app.server import make_app
from medclip.cli import main
from medclip.config import CONF
from medclip.models.folder import write_folder
from medclip.models.load import load_clip
from medclip.models.patches import fingerprint
from medclip.serve import Maker, choose_sets, listen, make_viewer
from medclip.types import UserError
from tests.app.viewer_toys import ARCHITECTURE, grid, planted, write_cohort, write_features


def composed(*words: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("serve", list(words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two exported CLIPs, a cohort, and features of each that say whose they are."""
    path = tmp_path_factory.mktemp("serve")
    for name in ("one", "two"):
        write_folder(load_clip(ARCHITECTURE), path / "models" / name, title=name)
        clip = load_clip(pretrained=str(path / "models" / name)).eval()
        whose = {"encoder": name, "weights": fingerprint(clip, clip.preprocess)}
        write_features(path / f"features_{name}" / "one.h5", planted(clip, "tumour", 42, 0), grid(), **whose)
    write_cohort(path / "cohort", clip)
    return path


def test_two_checkpoints_find_their_own_features(folder: Path) -> None:
    models = folder / "models"
    cfg = composed(
        f"cohort={folder}/cohort/slides", f"features={folder}", f"checkpoints.base={models}/one",
        f"+checkpoints.more={models}/two", "limits.gallery=3",
    )  # fmt: skip
    viewer = make_viewer(cfg)
    with TestClient(make_app(viewer), base_url="http://127.0.0.1") as client:
        viewer.wait()
        rows = client.get("/api/about").json()["models"]
        assert [(row["name"], row["encoder"], row["kind"]) for row in rows] == [
            ("base", "one", "text"), ("more", "two", "text")
        ]  # fmt: skip
        for name in ("base", "more"):
            top = client.get("/api/slides/one/map", params={"model": name, "prompt": "tumour"}).json()["top"]
            assert (top[0]["x"], top[0]["y"], len(top)) == (200, 400, 3)


def test_features_of_another_model_are_refused(folder: Path) -> None:
    whose = {"tiny": Maker("tiny", "ffff", 16)}
    with pytest.raises(UserError, match=r"made by one, while tiny is tiny"):
        choose_sets(str(folder / "features_one"), whose)
    # By name where files say no fingerprint; a mapping says that they are the same all the same.
    other = folder / "cohort" / "features_tiny"
    assert choose_sets(str(other), whose)["tiny"].folder == other
    with pytest.raises(UserError, match=r"made by tiny, while mine is mine"):
        choose_sets(str(other), {"mine": Maker("mine", "ffff", 16)})
    said = OmegaConf.create({"mine": str(other)})
    assert choose_sets(said, {"mine": Maker("mine", "ffff", 16)})["mine"].dim == 16
    with pytest.raises(UserError, match=r"16 numbers a patch, tiny has 8"):
        choose_sets(str(other), {"tiny": Maker("tiny", None, 8)})
    with pytest.raises(UserError, match=r"no checkpoint mine"):
        choose_sets(said, whose)
    with pytest.raises(UserError, match=r"no features of tiny"):
        choose_sets(OmegaConf.create({"base": None}), whose)
    write_features(folder / "again" / "a" / "features_tiny" / "one.h5", np.zeros((80, 16)), grid())
    write_features(folder / "again" / "b" / "features_tiny" / "one.h5", np.zeros((80, 16)), grid())
    with pytest.raises(UserError, match=r"give one of these folders"):
        choose_sets(str(folder / "again"), whose)


def test_elsewhere_needs_a_token_and_loopback_does_not() -> None:
    for host, given, made in (("127.0.0.1", "null", False), ("127.0.0.1", "auto", True), ("0.0.0.0", "null", True)):
        listening, address = listen(composed("cohort=x", f"host={host}", "port=0", f"token={given}"))
        listening.close()
        assert (address.token is not None) == made
        assert not made or (len(address.token or "") >= 32 and f"?token={address.token}" in address.page)
    listening, address = listen(composed("cohort=x", "port=0", "token=my-own-token"))
    listening.close()
    assert address.token == "my-own-token" and address.page.startswith(f"http://127.0.0.1:{address.port}/")


def test_what_can_be_mended_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    busy = taken.getsockname()[1]
    known = [f"cohort={folder}/cohort/slides", f"checkpoint={folder}/models/one", "port=0"]
    for words, why in (
        (["port=0"], "Missing mandatory value: cohort"),
        ([*known, f"port={busy}"], f"cannot listen at 127.0.0.1, port {busy}"),
        ([*known, "port=99999"], "port=99999"),
        ([*known, "token=short"], "token: give 8"),
        ([*known], "no features of checkpoint"),
        ([*known, f"features={folder}/none"], "no such folder"),
        ([*known, f"features={folder}", f"cohort={folder}/none"], "no slide in"),
        ([*known, f"features={folder}", "limits.waiting=0"], "limits.waiting=0"),
        ([*known, f"features={folder}", f"captions={folder}/none.csv"], "cannot be read"),
    ):
        monkeypatch.setattr(sys, "argv", ["medclip", "serve", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capfd.readouterr().err
        assert stop.value.code == 2 and why in said and len(said.splitlines()) == 1, said
    taken.close()

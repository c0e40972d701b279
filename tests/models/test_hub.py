"""Pushing a folder: what a hub is asked, what is sent, one line for what it refuses. The hub is a stub, no network."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from medclip.models.folder import write_folder
from medclip.models.hub import check_access, push_folder, repository
from medclip.models.load import load_clip
from medclip.types import UserError


class Hub:
    """What `HfApi` is asked, and a repository that may hold something."""

    def __init__(self, files: list[str] | None = None, error: Exception | None = None) -> None:
        self.files, self.error = files, error
        self.made: list[dict[str, Any]] = []
        self.sent: dict[str, str | bytes] = {}

    def whoami(self) -> dict[str, str]:
        if self.error:
            raise self.error
        return {"name": "me"}

    def repo_exists(self, name: str) -> bool:
        return self.files is not None

    def list_repo_files(self, name: str) -> list[str]:
        return self.files or []

    def create_repo(self, name: str, **options: Any) -> str:
        self.made.append({"name": name, **options})
        return f"https://hub/{name}"

    def create_commit(self, name: str, operations: list[Any], *, commit_message: str) -> None:
        if self.error:
            raise self.error
        assert not self.sent, "one commit"
        self.sent = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}


def refused(status: int) -> OSError:
    error: Any = OSError("Client Error")
    error.response = SimpleNamespace(status_code=status)
    return error


def test_everything_is_sent_in_one_private_commit(bert_cfg: dict, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_folder(load_clip(bert_cfg), folder, title="toy", lineage={"name": "run", "sources": [], "keys": "0"} | RUN)
    hub = Hub()
    assert push_folder(folder, "org/toy", api=hub) == "https://hub/org/toy"
    assert hub.made == [{"name": "org/toy", "private": True, "exist_ok": True}]
    assert set(hub.sent) == {path.name for path in folder.iterdir()}

    # Nothing of this machine is in what is sent; by the repository's name open_clip finds the text tower.
    text_cfg = json.loads(hub.sent["open_clip_config.json"])["model_cfg"]["text_cfg"]
    assert text_cfg["hf_model_name"] == text_cfg["hf_tokenizer_name"] == "org/toy"
    contents = [c if isinstance(c, bytes) else Path(c).read_bytes() for c in hub.sent.values()]
    assert not any(str(tmp_path).encode() in content for content in contents)
    assert b'create_model_and_transforms("hf-hub:org/toy")' in hub.sent["README.md"]
    assert b"hf_model_name" not in hub.sent["README.md"]
    # The folder itself stays as it was.
    assert json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]["hf_model_name"] == str(
        folder
    )


RUN = {
    "started": "2026-01-01",
    "parents": [],
    "training": {
        **{"losses": [], "weights": {}, "adapt": [], "optimizer": [], "lr": 0.1, "weight_decay": 0, "batch": 1},
        **{"batch_per_rank": 1, "ranks": 1, "accumulated": 1, "steps": 1, "precision": "32", "seed": 0},
        **{"parameters": 1, "trainable": 1},
    },
}


def test_what_is_there_is_not_written_over() -> None:
    check_access("org/toy", overwrite=False, api=Hub())
    check_access("org/toy", overwrite=False, api=Hub([".gitattributes"]))
    with pytest.raises(UserError, match=r"hf-hub:org/toy holds 1 files already \(README.md…\)"):
        check_access("org/toy", overwrite=False, api=Hub([".gitattributes", "README.md"]))
    check_access("org/toy", overwrite=True, api=Hub(["README.md"]))


@pytest.mark.parametrize(
    "error, message",
    [
        (LocalTokenNotFoundError("none"), "no valid token; set HF_TOKEN"),
        (refused(401), "no valid token"),
        (OfflineModeIsEnabled("offline mode"), r"offline mode.*check the network"),
        (ConnectionError("refused"), r"cannot push to org/toy \(refused\): check the network"),
    ],
)
def test_one_line_for_what_is_missing(error: Exception, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_access("org/toy", overwrite=False, api=Hub(error=error))


def test_a_token_that_may_not_write(vit_cfg: dict, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(UserError, match="the token may not write there"):
        push_folder(tmp_path, "org/toy", api=Hub(error=refused(403)))


@pytest.mark.parametrize("push", ["org/toy", "hf-hub:toy", "hf-hub:a/b/c", "hf-hub:or g/toy", "hf-hub:"])
def test_names(push: str) -> None:
    with pytest.raises(UserError, match="names no repository"):
        repository(push)


def test_a_name() -> None:
    assert repository("hf-hub:org/toy-1.0") == "org/toy-1.0"

"""An exported folder on Hugging Face's hub: one commit, private unless said otherwise, and never over something else.

Only what is said is sent: the folder's own files. In them this machine's folders become the repository's name, by which
plain open_clip and timm load it: `hf-hub:org/name`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from medclip.models.source import CONFIG
from medclip.models.tokenizer import first_line
from medclip.types import UserError

PREFIX = "hf-hub:"


def repository(push: str) -> str:
    """`org/name` of `hf-hub:org/name`.

    Raises:
        UserError: it is no such name.
    """
    name = push.removeprefix(PREFIX)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"push={push} names no repository ({first_line(error)}): say push=hf-hub:org/name") from error
    if not push.startswith(PREFIX) or name.count("/") != 1:
        raise UserError(f"push={push} names no repository: say push=hf-hub:org/name")
    return name


def check_access(name: str, *, overwrite: bool, api: Any = None) -> None:
    """Refuse before anything is written or sent.

    Args:
        name: `org/name`.
        overwrite: whether a repository may hold something already.
        api: what talks to the hub; None: with the token of HF_TOKEN or of `hf auth login`.

    Raises:
        UserError: no network, no token, or a repository that holds something.
    """
    api = api or HfApi()
    try:
        api.whoami()
        held = [file for file in api.list_repo_files(name) if file != ".gitattributes"] if api.repo_exists(name) else []
    except Exception as error:  # hub, http and file errors of several libraries
        raise _cannot(name, error) from error
    if held and not overwrite:
        raise UserError(
            f"{PREFIX}{name} holds {len(held)} files already ({held[0]}…): choose another name, or say overwrite=true "
            "for one more commit there"
        )


def push_folder(folder: Path, name: str, *, private: bool = True, api: Any = None) -> str:
    """Send an exported folder, as one commit; returns the repository's address.

    Args:
        folder: written by `write_folder` or `write_timm`.
        name: `org/name`; made where it does not exist.
        private: who may see a repository that is made here; an existing one stays as it is.
        api: as for `check_access`.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    api = api or HfApi()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), _content(path, folder, name)) for path in files
    ]
    try:
        where = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(name, operations, commit_message="Exported by medclip")
    except Exception as error:  # hub, http and file errors of several libraries
        raise _cannot(name, error) from error
    return str(where)


def _content(path: Path, folder: Path, name: str) -> str | bytes:
    """The file's path; of the few that name folders, the text with the repository's name in their place."""
    if path == folder / CONFIG:
        config = json.loads(path.read_text(encoding="utf-8"))
        text_cfg = config["model_cfg"]["text_cfg"]
        for key in ("hf_model_name", "hf_tokenizer_name"):
            if text_cfg.get(key):
                text_cfg[key] = name
        return json.dumps(config, indent=2).encode()
    if path == folder / "README.md":
        text = path.read_text(encoding="utf-8").replace(f"local-dir:{folder.name}", f"{PREFIX}{name}")
        return re.sub(r"\n\nPlain open_clip finds the text tower by .*?\n", "\n", text).encode()
    return str(path)


def _cannot(name: str, error: BaseException) -> UserError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return UserError(f"cannot push to {name}: no valid token; set HF_TOKEN to one with write access")
    if status == 403:
        return UserError(f"cannot push to {name}: the token may not write there; use one that may, or another name")
    return UserError(f"cannot push to {name} ({first_line(error)}): check the network; the folder is as it was")

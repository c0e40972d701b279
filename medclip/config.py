"""Where the configs live, how a verb starts, and where its output may go.

A verb is a function of one composed config. `@verb("train")` turns it into a program whose errors are one line:
`UserError`, Hydra's own complaints, and errors that `instantiate` wrapped, all without a traceback (set
`MEDCLIP_TRACEBACK=1` to see it).
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from medclip.types import UserError

_HERE = Path(__file__).parent
# One rule for a checkout, an editable install and a wheel (which ships conf/ as medclip/conf).
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


_MARK = "# Composed by medclip: what this run was told.\n"  # first line of our config.yaml
_REMEDY = {
    False: "see `--cfg job` for the keys there are",
    True: 'quote what holds spaces, = or ", once for the shell and once for Hydra: \'key="a b"\'',
}


def verb(name: str) -> Callable[[Callable[[DictConfig], object]], Callable[[], None]]:
    """Make `run(cfg)` the program of `medclip NAME`, composed from `conf/NAME.yaml`."""

    def wrap(run: Callable[[DictConfig], object]) -> Callable[[], None]:
        def stop(error: Exception) -> NoReturn:
            message = _one_line(error)
            if message is None or os.environ.get("MEDCLIP_TRACEBACK"):
                raise error
            print(f"medclip {name}: {message}", file=sys.stderr)
            sys.exit(2)

        started = False

        @functools.wraps(run)
        def guarded(cfg: DictConfig) -> object:
            nonlocal started
            started = True
            try:
                return run(cfg)
            except Exception as error:  # here, since Hydra would print a line of its own before handing it on
                stop(error)

        program = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(guarded)

        @functools.wraps(run)
        def main() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # hand errors to us instead of printing them over several lines
            try:
                program()
            except Exception as error:
                # Hydra's sweeper makes the folder itself; some of Hydra's own errors are OSErrors too.
                if isinstance(error, OSError) and not isinstance(error, HydraException) and not started:
                    error = UserError(f"cannot write to {error.filename} ({error.strerror}): choose another `output=`")
                stop(error)
            except KeyboardInterrupt:
                sys.exit(130)

        return main

    return wrap


def _one_line(error: BaseException) -> str | None:
    """The user's line for an error, or None for a bug of ours, which keeps its traceback."""
    chain = _chain(error)
    for link in chain:
        if isinstance(link, UserError):
            return " ".join(str(link).split())
        if type(link).__name__ == "MisconfigurationException":  # Lightning's word for what the user said wrongly
            return f"{' '.join(str(link).split())} (see trainer in `--cfg job`)"
    if isinstance(error, InstantiationException):
        key, missing = str(error).rpartition("full_key: ")[2], str(error).startswith("Error locating target")
        if missing or isinstance(error.__cause__, TypeError | ValueError):
            root = chain[-1] if missing else error.__cause__
            return f"{key} cannot be built: {' '.join(str(root).split())} (see {key} in `--cfg job`)"
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
        words = [word for word in sys.argv[1:] if (CONF / re.split("[@=]", word)[0].lstrip("+")).is_dir()]
        nulls = [word for word in words if word.rpartition("=")[2].lower() in ("null", "")]
        return (
            f"{' '.join(nulls or words)}: a group takes the name of a config, not null: leave the word out, or take "
            "away what is chosen by default: ~GROUP"
        )
    if isinstance(error, MissingMandatoryValue):
        key = re.sub(r"\[(\d+)\]", r".\1", str(error).splitlines()[0].removeprefix("Missing mandatory value: "))
        return f"Missing mandatory value: {key}: say {key}=… on the command line"
    # `instantiate` wraps whatever a constructor raised; anything else under it is ours to explain, not the user's.
    composing = isinstance(error, OverrideParseException | ConfigCompositionException | MissingConfigException)
    if composing or (
        isinstance(error, HydraException | OmegaConfBaseException)
        and all(isinstance(link, HydraException | OmegaConfBaseException | KeyError | AttributeError) for link in chain)
    ):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        skipped = ("full_key", "object_type", "Config search path", "See https://")
        wanted = [line for line in lines if not line.startswith(skipped)]
        return " ".join(wanted[:3]) + f" ({_REMEDY[isinstance(error, OverrideParseException)]})"
    return None


def _chain(error: BaseException) -> list[BaseException]:
    """An error, what it was raised from, and so on."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def build(config: Any, **arguments: Any) -> Any:
    """Hydra's `instantiate`, whose wrapping is taken off where a constructor raised a `UserError`."""
    try:
        return instantiate(config, **arguments)
    except InstantiationException as error:
        for link in _chain(error):
            if isinstance(link, UserError):
                raise link from None
        raise


def job_folder(cfg: DictConfig) -> Path:
    """`cfg.output`; a sweep's jobs get one numbered folder in it each."""
    folder = Path(str(cfg.output)).expanduser()
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        folder = folder / str(HydraConfig.get().job.num)
    return folder


def _holds_something(folder: Path) -> bool:
    """Whether there is more in `folder` than a start leaves that failed before it did anything."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names or not names <= {"config.yaml", "provenance.json", "lineage.json"}:
        return bool(names)
    config = folder / "config.yaml"
    return not config.is_file() or not config.read_text(errors="replace").startswith(_MARK)


def output_folder(cfg: DictConfig, *, resume: bool = False, rank: int = 0) -> Path:
    """Create and return the run's folder, see `job_folder`.

    A folder that already holds something is refused unless the run resumes in it or `overwrite=true` was said, so
    that no result is ever replaced silently; what a start that failed has left does not count. The composed config is
    written to `config.yaml`. All of this is the affair of `rank` 0; other ranks only learn the name.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    folder = job_folder(cfg)
    if rank > 0:
        return folder
    if _holds_something(folder) and not resume and not cfg.get("overwrite", False):
        raise UserError(f"output folder {folder} is not empty: choose another `output=`, or say `overwrite=true`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "config.yaml", _MARK + OmegaConf.to_yaml(cfg, resolve=False))
    except OSError as error:
        raise UserError(
            f"cannot write to output folder {folder} ({error.strerror}): choose another `output=`"
        ) from error
    return folder


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a whole file or none of it: a killed run leaves the old content, never half of the new."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)

"""Where the configs live, how a verb starts, and where its output may go.

A verb is a function of one composed config. `@verb("train")` turns it into a program whose errors are one line:
`UserError`, Hydra's own complaints, and errors that `instantiate` wrapped, all without a traceback (set
`MEDCLIP_TRACEBACK=1` to see it).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medclip.types import UserError

_HERE = Path(__file__).parent
# One rule for a checkout, an editable install and a wheel (which ships conf/ as medclip/conf).
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"


def verb(name: str) -> Callable[[Callable[[DictConfig], object]], Callable[[], None]]:
    """Make `run(cfg)` the program of `medclip NAME`, composed from `conf/NAME.yaml`."""

    def wrap(run: Callable[[DictConfig], object]) -> Callable[[], None]:
        @functools.wraps(run)
        def guarded(cfg: DictConfig) -> object:
            return run(cfg)

        program = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(guarded)

        @functools.wraps(run)
        def main() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # hand errors to us instead of printing them over several lines
            try:
                program()
            except Exception as error:
                message = _one_line(error)
                if message is None or os.environ.get("MEDCLIP_TRACEBACK"):
                    raise
                print(f"medclip {name}: {message}", file=sys.stderr)
                sys.exit(2)
            except KeyboardInterrupt:
                sys.exit(130)

        return main

    return wrap


def _one_line(error: BaseException) -> str | None:
    """The user's line for an error, or None for a bug of ours, which keeps its traceback."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, UserError):
            return " ".join(str(link).split())
    # `instantiate` wraps whatever a constructor raised; what is under it is then ours to explain, not the user's.
    if isinstance(error, HydraException | OmegaConfBaseException) and all(
        isinstance(link, HydraException | OmegaConfBaseException | KeyError | AttributeError) for link in chain
    ):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        wanted = [line for line in lines if not line.startswith(("full_key", "object_type", "Config search path"))]
        return " ".join(wanted[:3]) + " (see `--cfg job` for the keys there are)"
    return None


def output_folder(cfg: DictConfig, *, resume: bool = False) -> Path:
    """Create and return the run's folder, `cfg.output`; a sweep's jobs get one numbered folder each.

    A folder that already holds something is refused unless the run resumes in it or `overwrite=true` was said, so that
    no result is ever replaced silently. The composed config is written to `config.yaml`.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    folder = Path(str(cfg.output)).expanduser()
    if HydraConfig.initialized() and HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN:
        folder = folder / str(HydraConfig.get().job.num)
    if folder.is_dir() and any(folder.iterdir()) and not resume and not cfg.get("overwrite", False):
        raise UserError(f"output folder {folder} is not empty: choose another `output=`, or say `overwrite=true`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=False))
    except OSError as error:
        raise UserError(f"cannot write to output folder {folder} ({error.strerror}): choose another `output=`") from error
    return folder


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a whole file or none of it: a killed run leaves the old content, never half of the new."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)

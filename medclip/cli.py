"""`medclip VERB [hydra overrides]`: the one console command.

Each verb is a module that runs by itself (`python -m medclip.train`), with a `main()` made by `config.verb`; nothing is
imported before the verb is known, so that `medclip --help` answers at once.
"""

from __future__ import annotations

import os
import runpy
import sys

VERBS = {
    "train": "any training: continued contrastive pretraining, later MAE, probes, heads",
    "evaluate": "evaluate one checkpoint, or several side by side: gain and forgetting in one report",
    "extract": "whole-slide images -> patches (shards, h5, images) and features",
    "export": "checkpoint -> open_clip folder (safetensors); WiSE-FT blends",
    "heatmap": "slides, their features and a checkpoint -> maps: PNG, GeoJSON for QuPath, pyramidal TIFF, tables",
    "serve": "the viewer: slides in the browser, with text prompts as maps",
    "demo": "the whole way on generated data (or on your own pairs), a few minutes on two CPU cores",
}


def usage() -> str:
    rows = "\n".join(f"  {name:<10}{text}" for name, text in VERBS.items())
    return (
        "usage: medclip VERB [overrides]\n\n"
        f"{rows}\n\n"
        "`medclip VERB --help` lists a verb's groups and keys, `--cfg job` prints the composed config, `-m` sweeps.\n"
        "Overrides are Hydra's: `medclip train experiment=tiny data.batch_size=64`.\n"
        'Tab completion in bash: eval "$(medclip -sc install=bash)".'
    )


def on_one_line(words: list[str]) -> list[str]:
    """Overrides that were quoted over several lines, which Hydra's grammar does not know."""
    return [" ".join(word.splitlines()) for word in words]


def complete(args: list[str]) -> None:
    """Hydra's tab completion, which knows no verbs: `eval "$(medclip -sc install=bash)"` once, then TAB."""
    verb, line = "train", os.environ.get("COMP_LINE", "")
    if args[1:] == ["query=bash"]:
        _, *words = line.split() or [""]
        if len(words) + line.endswith(" ") < 2:
            print(*VERBS)
            return
        verb = words[0]
        os.environ["COMP_LINE"] = line.replace(f" {verb}", "", 1)
    if verb in VERBS:
        from medclip.config import verb as program

        sys.argv = ["medclip", *args]
        program(verb)(lambda cfg: None)()


def main() -> None:
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0 if args else 2)
    if args[0] in ("-sc", "--shell-completion"):
        complete(args)
        return
    name = args[0]
    if name in ("-V", "--version"):
        from medclip import __version__

        print(f"medclip {__version__}")
        return
    if name not in VERBS:
        print(f"medclip: unknown verb {name!r}: choose one of {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv[1:] = on_one_line(args[1:])
    # Before torch is loaded. OpenMP's threads else spin while they wait for each other, and a thread whose core a data
    # worker has taken is waited for long: on a busy machine a step took 5 x as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Run as `python -m medclip.VERB`, which is how Lightning starts the other ranks of a DDP run again.
    runpy.run_module(f"medclip.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

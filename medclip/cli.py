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
    "export": "checkpoint -> open_clip folder (safetensors); WiSE-FT blends",
    "demo": "the whole way on generated data (or on your own pairs), a few minutes on two CPU cores",
}


def usage() -> str:
    rows = "\n".join(f"  {name:<10}{text}" for name, text in VERBS.items())
    return (
        "usage: medclip VERB [overrides]\n\n"
        f"{rows}\n\n"
        "`medclip VERB --help` lists a verb's groups and keys, `--cfg job` prints the composed config,\n"
        "`-m` sweeps. Overrides are Hydra's: `medclip train experiment=tiny data.batch_size=64`."
    )


def main() -> None:
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0 if args else 2)
    name = args[0]
    if name in ("-V", "--version"):
        from medclip import __version__

        print(f"medclip {__version__}")
        return
    if name not in VERBS:
        print(f"medclip: unknown verb {name!r}: choose one of {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv[1:] = args[1:]
    # Before torch is loaded. OpenMP's threads else spin while they wait for each other, and a thread whose core a data
    # worker has taken is waited for long: on a busy machine a step took 5 x as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Run as `python -m medclip.VERB`, which is how Lightning starts the other ranks of a DDP run again.
    runpy.run_module(f"medclip.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

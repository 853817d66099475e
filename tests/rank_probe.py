"""A script as the deepspeed launcher starts it, with a probe or a fault put in first: rank_probe.py
PATCH_FILE 03_sft args…"""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    argv = sorted(
        sys.argv[1:], key=lambda word: word.startswith("--local_rank")
    )  # the launcher puts it first
    patch, script, *argv = argv
    sys.argv[0] = f"{script}.py"
    exec(Path(patch).read_text())
    module = importlib.import_module(script)
    module.main(module.parse_args(argv))

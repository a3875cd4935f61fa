"""Kernels, whole training steps and data, compared with their alternatives.

    python -m bench kernels    # on a GPU: each kernel and its alternatives (bench/kernels.py)
    python -m bench step       # our training steps, and those of transformers + peft (bench/step.py); a CPU can
                               # run only the small cases
    python -m bench tiles      # attention with other tiles (bench/tiles.py)
    python -m bench profile    # where the time of our training step goes (bench/profile.py)
    python -m bench loader     # steps of data and large files (bench/loader.py)
    bash bench/gpu.sh          # everything that needs a GPU, in nine minutes

`python -m bench kernels --help` and `python -m bench step --help` print the settings. The last line of output is JSON.
A row is one case that is measured. bench/README.md describes the rows, the protocol and the results.
"""

import datetime
import importlib
import sys

import config
from run.arguments import parse


def main(argv):
    what = argv[0] if argv else ""
    if what in ("-h", "--help"):
        return print(__doc__.strip())
    if what not in ("kernels", "step", "tiles", "profile", "loader"):
        config.stop("which benchmark? python -m bench kernels, step, tiles, profile or loader")
    part = importlib.import_module(f"bench.{what}")
    settings = parse(part.Settings, argv[1:], part.__doc__)
    settings.date = settings.date or datetime.date.today().isoformat()
    part.main(settings, [a for a in argv[1:] if not a.startswith("--out=")])


if __name__ == "__main__":
    with config.one_line_errors():
        main(sys.argv[1:])

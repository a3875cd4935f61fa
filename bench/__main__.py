"""Kernels and whole training steps, beside what else one could use.

    python -m bench kernels                        # on a GPU: every kernel beside its peers (bench/kernels.py)
    python -m bench step                           # whole training steps beside transformers + peft (bench/step.py);
                                                   # on a CPU small ones, in some minutes
    bash bench/gpu.sh                              # everything that needs a GPU, in ten minutes

`python -m bench kernels --help` and `python -m bench step --help` print the settings; the last line is JSON.
bench/README.md says what the rows mean, how they are measured and where results are kept.
"""

import datetime
import importlib
import sys

import config

if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what not in ("kernels", "step"):
        print(__doc__.strip())
        sys.exit(0 if what in ("-h", "--help") else "error: python -m bench kernels, or python -m bench step")
    part = importlib.import_module(f"bench.{what}")    # of the folder, which comes before this file
    settings = config.parse(part.Settings, sys.argv[2:], part.__doc__)
    settings.date = settings.date or datetime.date.today().isoformat()
    part.main(settings, [a for a in sys.argv[2:] if not a.startswith("--out=")])

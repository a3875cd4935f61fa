"""Kernels and whole training steps, beside what else one could use.

    python bench.py kernels                        # on a GPU: every kernel beside its peers (bench/kernels.py)
    python bench.py step                           # whole training steps beside transformers + peft (bench/step.py);
                                                   # on a CPU small ones, in some minutes
    bash bench/gpu.sh                              # everything that needs a GPU, in ten minutes

`python bench.py kernels --help` and `python bench.py step --help` print the settings; the last line is JSON.
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
        sys.exit(0 if what in ("-h", "--help") else "error: python bench.py kernels, or python bench.py step")
    part = importlib.import_module(f"bench.{what}")    # of the folder, which comes before this file
    settings = config.load(part.Settings, sys.argv[2:], part.__doc__)
    settings.date = settings.date or datetime.date.today().isoformat()
    part.main(settings, [a for a in sys.argv[2:] if not a.startswith("--out=")])

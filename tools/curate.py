"""Clean data, and make data.

    python -m tools.curate filter FILE --out=KEPT.jsonl ...       # tools/curate_filter.py: bad pairs and duplicates go
    python -m tools.curate synth FILE --out=MADE.jsonl ...        # tools/curate_synth.py: captions become conversations

`python -m tools.curate filter --help` and `synth --help` list the settings. docs/data.md has examples.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
from tools import curate_filter, curate_synth

COMMANDS = {"filter": curate_filter.main, "synth": curate_synth.main}


def main(argv):
    if argv and argv[0] in ("-h", "--help"):
        return print(__doc__.strip())
    if not argv or argv[0] not in COMMANDS:
        config.stop(f"usage: python -m tools.curate {'|'.join(COMMANDS)} FILE --out=OUT.jsonl ...; --help says more")
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    with config.one_line_errors():
        main(sys.argv[1:])

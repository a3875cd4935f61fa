"""Draw the curves of one or more runs: loss, validation loss, learning rate and gradient norm over steps.

    python -m tools.plot RUN [RUN ...] [--out=FILE.png]
"""

import dataclasses
import json
import sys
from pathlib import Path

import config
from config import setting
from run.arguments import parse

CURVES = {"loss": "training loss (nats per supervised token)", "val_loss": "validation loss", "lr": "learning rate",
          "grad_norm": "gradient norm"}


@dataclasses.dataclass
class Settings:
    out: str = setting("curves.png", "file to write; its name ends in .png, .svg or .pdf")


def read_log(run):
    """Read the log of a run -> {curve: [(step, value)]}. Values that are not numbers are left out. run: the path of a
    run folder, or of a log.jsonl."""
    file = Path(run) if Path(run).is_file() else Path(run) / "log.jsonl"
    try:
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        curves = {k: [(row["step"], row[k]) for row in rows if isinstance(row.get(k), int | float)] for k in CURVES}
    except OSError as e:
        config.stop(f"{run} is not a run: {file}: {e.strerror}")
    except (ValueError, KeyError, AttributeError) as e:
        config.stop(f"{file} is not the log of a run: {type(e).__name__} {e}")
    return curves if any(curves.values()) else config.stop(f"{file} has no curve yet")


def main(argv):
    runs = [a for a in argv if not a.startswith("-")]
    s = parse(Settings, [a for a in argv if a.startswith("-")], __doc__)
    if not runs:
        config.stop("which run? python -m tools.plot RUN [RUN ...] [--out=FILE.png]")
    logs = [(run, read_log(run)) for run in runs]
    try:
        import matplotlib
    except ImportError:
        config.stop("tools.plot needs matplotlib: pip install matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for ax, (curve, title) in zip(axes.flat, CURVES.items()):
        for i, (run, log) in enumerate(logs):
            steps, values = zip(*log[curve]) if log[curve] else ((), ())
            ax.plot(steps, values, color=f"C{i}", label=run, marker="." if len(steps) < 30 else None)
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False, fontsize=9)
    try:
        figure.savefig(s.out, dpi=120)
    except (OSError, ValueError) as e:
        config.stop(f"cannot write {s.out}: {e}")
    print(s.out)


if __name__ == "__main__":
    with config.one_line_errors():
        main(sys.argv[1:])

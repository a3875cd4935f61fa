"""--track: send log.jsonl to trackio, wandb or TensorBoard, too. Only rank 0 does so. log.jsonl stays the record: its
lines are read from the file and sent. A resumed run is a new run of the tracker, which first gets the lines of the
steps before, so each of its curves is whole. Only numbers are sent. After an error of the tracker, training goes on
without it."""

import atexit
import contextlib
import importlib
import json
import os
import sys

from config import stop


def send_nothing(values, step):
    """What takes the place of a tracker that has failed"""


def tracker(kind, out, settings):
    """-> function that sends the lines which log.jsonl has got since the last call. The package `kind` is imported now;
    the tracker's run begins with the first call. The project is pumice, or WANDB_PROJECT, TRACKIO_PROJECT."""
    try:
        module = importlib.import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)
    except ImportError as e:
        stop(f"track={kind}: {e} (pip install {kind})")
    at, send = 0, None

    def begin():
        if kind == "tensorboard":
            board = module.SummaryWriter(str(out / kind), purge_step=0)    # hides the events of the run before
            atexit.register(board.close)
            return lambda values, step: [board.add_scalar(k, v, step) for k, v in values.items()]
        project = os.environ.get(f"{kind.upper()}_PROJECT", "pumice")
        module.init(project=project, name=out.resolve().name, config=settings)
        atexit.register(module.finish)
        return lambda values, step: module.log(values, step=step)

    def send_lines():
        nonlocal at, send
        rows = []
        with contextlib.suppress(OSError), open(out / "log.jsonl", "rb") as file:
            file.seek(at)
            lines, at = file.read().splitlines(), file.tell()
            for line in lines:
                with contextlib.suppress(ValueError):                      # a full disk has cut this line
                    rows.append(json.loads(line))
        try:
            send = send or begin()
            for row in rows:
                send({k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}, row["step"])
        except Exception as e:                                             # of any type: it is the tracker's code
            print(f"track={kind} ends here: {type(e).__name__}: {e}".splitlines()[0], file=sys.stderr)
            send = send_nothing

    return send_lines

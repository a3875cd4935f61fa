"""The best step of a run by a metric of log.jsonl, and whether the run ends early. This state follows from log.jsonl
alone: a run that was killed and resumed reads the lines of the steps before, and decides as an uninterrupted one.

    keep_best=METRIC    the checkpoint of the best step is kept; at the end of the run, best/ has its weights
    patience=N          the run ends after N evaluations in a row that were not better than the best one
"""

import json

from config import stop
from run.log import lines_until


class Best:
    """metric: name of a number in log.jsonl; "" = none. lines: of log.jsonl, of the steps before a resumed run goes on.
    Less is better for a loss, more for all other metrics. Of equal values the first is the best; null (nan, inf) is
    never better."""

    def __init__(self, metric="", patience=0, lines=()):
        self.metric, self.patience, self.step, self.value, self.since = metric, patience, 0, None, 0
        for line in lines:
            self.see(json.loads(line))

    def see(self, row):
        """Count a row of log.jsonl, if it has the metric. since: evaluations after the best one"""
        if self.metric not in row:
            return
        value = row[self.metric]
        value = value if value is None or not self.metric.endswith("loss") else -value
        better = value is not None and (self.value is None or value > self.value)
        self.since = 0 if better else self.since + 1
        if better:
            self.step, self.value = row["step"], value

    @property
    def over(self):
        return 0 < self.patience <= self.since

    def why(self):
        """-> text for the last line of a run that ended early"""
        sign = -1 if self.metric.endswith("loss") else 1
        than = "" if self.value is None else f" than {sign * self.value:.4f} at step {self.step}"
        return f"{self.metric} was not better in {self.since} evaluations{than}"


def watched(s, world, file, start, known):
    """-> Best of the steps up to `start`; all ranks get that of rank 0. known: metrics that the run will log; patience
    without keep_best watches the first of them"""
    if s.keep_best and s.keep_best not in known:
        stop(f"keep_best={s.keep_best} is not logged by this run: "
             + (f"it logs {', '.join(known)}" if known else "val_data is empty, so nothing is evaluated"))
    if s.patience and not known:
        stop(f"patience={s.patience} counts evaluations, but val_data is empty")
    if s.overfit or not s.keep_best and not s.patience:
        return Best()
    lines = world.gather(lines_until(file, start) if world.rank == 0 else [])[0]
    return Best(s.keep_best or known[0], s.patience, lines)

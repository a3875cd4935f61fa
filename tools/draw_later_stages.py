"""Draw the rewards of demo/later_stages.py over the steps of training: docs/later_stages.svg.

    python -m tools.draw_later_stages

Left: GRPO with the reward exact match, one line per seed. Right: the reward that counts words. A point is the mean of
the last ten steps.
"""

import sys
from pathlib import Path
from statistics import fmean

from config import one_line_errors, stop
from demo.systems import measured
from run.arguments import positional
from tools.draw_lecture import WIDTH, picture, words

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/later_stages.svg"
TOP, HEIGHT, WIDE, COLORS = 70, 190, 270, ("#2f74c0", "#c07a1c", "#22804a")     # of a panel; one colour per seed
PANELS = [("Share of right answers (GRPO)", "seed ", ("grpo_0", "grpo_1", "grpo_2"), (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
          ("Words per answer / 10 (hacked)", "", ("hacked",), (0.0, 0.5, 1.0, 1.5))]


def running_means(values, k=10):
    """-> mean of the last k values, at each value"""
    return [fmean(values[max(0, i + 1 - k) : i + 1]) for i in range(len(values))]


def panel(left, title, name, curves, ticks):
    """name: what stands before the number of a seed; curves: {arm: rewards of its steps}; ticks: values on the vertical
    axis -> parts of the SVG"""
    steps = max(map(len, curves.values()))

    def y(value):
        return TOP + HEIGHT * (ticks[-1] - value) / (ticks[-1] - ticks[0])

    out = [words(left, TOP - 22, title, "title")]
    for value in ticks:
        out += [f'<path d="M{left} {y(value):.1f} h{WIDE}" class="line" stroke-width="0.5"/>',
                words(left - 8, y(value) + 4, f"{value:.1f}", "soft end")]
    for step in range(0, steps + 1, 50):
        out.append(words(left + WIDE * step / steps, TOP + HEIGHT + 20, str(step), "soft mid"))
    for i, (arm, rewards) in enumerate(curves.items()):
        at = [f"{left + WIDE * (n + 1) / steps:.1f} {y(v):.1f}" for n, v in enumerate(running_means(rewards))]
        out.append(f'<path d="M{" L".join(at)}" fill="none" stroke="{COLORS[i]}" stroke-width="2"/>')
        if name:
            out += [f'<path d="M{left + 75 * i} {TOP + HEIGHT + 40} h16" stroke="{COLORS[i]}" stroke-width="3"/>',
                    words(left + 75 * i + 22, TOP + HEIGHT + 45, name + arm.split("_")[1])]
    return [*out, words(left + WIDE, TOP + HEIGHT + 45, "step", "soft end")]


def reward_picture(rows):
    """Rows of demo/later_stages.jsonl -> SVG text"""
    parts, rewards = [], {row["arm"]: row["log"].get("reward") for row in rows}
    for i, (title, name, arms, ticks) in enumerate(PANELS):
        parts += panel(50 + (WIDTH // 2) * i, title, name, {arm: rewards[arm] for arm in arms}, ticks)
    return picture(TOP + HEIGHT + 70, [words(16, 24, "Reward over the steps of training, mean of ten steps"), *parts])


def main(argv):
    if argv:
        stop("usage: python -m tools.draw_later_stages")
    PAGE.write_text(reward_picture(measured(ROOT / "demo/later_stages.jsonl")), "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    with one_line_errors():
        main(positional(sys.argv[1:], __doc__))

"""Rewards for train_grpo.py: functions of question, answer and reference (the true answer) -> float. A file of your own
may hold others: --reward=FILE.py:FUNCTION."""

import runpy
from pathlib import Path

from config import stop
from metrics.boxes import iou, read_box
from metrics.words import exact


def exact_reward(question, answer, reference):
    """1 if the answer is the true one; case, spaces and a final period are ignored"""
    return float(exact(answer, [reference]))


def iou_reward(question, answer, reference):
    """Intersection over union of the boxes in the answer and in the reference; 0 without a box"""
    box, true = read_box(answer), read_box(reference)
    return iou(box, true) if box and true else 0.0


def format_reward(question, answer, reference):
    """1 if the answer has the form of the reference: as many words, and numbers where it has numbers"""
    said, true = answer.split(), reference.split()
    return float(len(said) == len(true) and all(a.isdigit() == b.isdigit() for a, b in zip(said, true)))


def length_reward(question, answer, reference):
    """Words of the answer, divided by 10. It is a bad reward, made to be exploited"""
    return len(answer.split()) / 10


REWARDS = {"exact": exact_reward, "iou": iou_reward, "format": format_reward, "length": length_reward}


def read_reward(name):
    """The setting `reward` -> function"""
    if name in REWARDS:
        return REWARDS[name]
    file, colon, function = name.rpartition(":")
    if not colon or not Path(file).is_file():
        stop(f"reward={name}: {', '.join(REWARDS)}, or FILE.py:FUNCTION")
    try:
        found = runpy.run_path(file).get(function)
    except Exception as e:                                     # the file of a user may raise anything
        stop(f"reward={name}: {file} cannot be run: {type(e).__name__}: {e}")
    return found if callable(found) else stop(f"reward={name}: {file} has no function {function}")

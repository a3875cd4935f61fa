"""Boxes as text, and how well two boxes overlap: RefCOCO, RefCOCO+, RefCOCOg (Kazemzadeh et al. 2014; Yu et al. 2016).

A box is (x1, y1, x2, y2): left, top, right, bottom, as shares of the image's width and height, 0 to 1."""

import re

from metrics.certainty import interval

_QWEN = re.compile(r"\((.*?)\),\((.*?)\)")                       # eval_mm/evaluate_grounding.py: numbers 0 to 999
_LOC = re.compile(r"<loc(\d{4})>" * 4)                           # PaliGemma: top, left, bottom, right, of 1024
_FLOATS = re.compile(r"\[\s*" + r",\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")    # LLaVA-1.5, Shikra, lmms-eval


def read_box(text):
    """Find the first box in a text -> (x1, y1, x2, y2), or None. Three forms are read:

        <box>(120,56),(480,511)</box>         Qwen-VL: numbers from 0 to 999. Its program divides by 999
        [0.12, 0.06, 0.48, 0.51]              LLaVA-1.5 and Shikra: shares of width and height
        <loc0057><loc0123><loc0523><loc0492>  PaliGemma: y before x, in 1024 steps"""
    if found := _LOC.search(text):
        top, left, bottom, right = (int(v) / 1024 for v in found.groups())
        return left, top, right, bottom
    if found := _FLOATS.search(text):
        return tuple(float(v) for v in found.groups())
    if found := _QWEN.search(text):
        try:
            (left, top), (right, bottom) = ([float(v) / 999 for v in corner.split(",")] for corner in found.groups())
            return left, top, right, bottom
        except ValueError:                                       # not two numbers in a corner
            return None


def qwen_box(box):
    """Write a box as Qwen-VL does: <box>(x1,y1),(x2,y2)</box>, numbers from 0 to 999"""
    x1, y1, x2, y2 = (min(999, max(0, int(v * 999 + 0.5))) for v in box)
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def iou(a, b):
    """Intersection over union of two boxes. A box whose right side is left of its left side overlaps with nothing."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def without_padding(box, size):
    """Turn a box on LLaVA's padded square into one on the image of (width, height) = size. LLaVA-1.5 was trained with
    such boxes (LLaVA, issue 606)."""
    side = max(size)
    return tuple((box[i] * side - (side - size[i % 2]) // 2) / size[i % 2] for i in range(4))


def refcoco_iou(answer, question, padded=False):
    """-> intersection over union of the box in an answer and the true one; 0 if the answer has no box"""
    box = read_box(answer)
    if box and padded:
        box = without_padding(box, question["size"])
    return max(iou(box, read_box(t)) for t in question["answers"]) if box else 0.0


def refcoco_totals(answers, questions, points, padded=False):
    """-> dict: mean IoU and its 95 % interval, and the number of answers without a box"""
    overlaps = [0.0 if a is None else refcoco_iou(a, q, padded) for a, q in zip(answers, questions)]
    return {"iou": sum(overlaps) / len(overlaps), "iou_ci95": list(interval(overlaps)),
            "without_box": sum(a is None or not read_box(a) for a in answers)}

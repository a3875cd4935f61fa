"""MMMU (Yue et al. 2024, arXiv 2311.16502), as its eval_utils.py scores it: multiple choice and open questions."""

import random
import re

INDICATORS = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
_NUMBERS = [r"-?\b\d{1,3}(?:,\d{3})+\b",                                               # 1,234,567
            r"-?\d+(?:\.\d+)?[eE][+-]?\d+",                                            # 1.5e-3
            r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"]                    # 1.5  .5  12


def mmmu_letter(answer, options, rng, lmms=False):
    """Read the letter out of an answer -> the letter, was it guessed?

    1. letters in brackets, (A). 2. letters between spaces. 3. in answers of more than five words, the texts of the
    options. Of several candidates, the one whose last place is last. 4. If nothing was found, a random letter: the
    official program draws from one generator with seed 42 over the whole run, so this number depends on the order.

    rng     random.Random(42), for all questions of a file in their order
    lmms    lmms-eval (75571cf) has another step 2: a letter before a space ("DNA is" is A), then a letter before a
            period. Its error: it compares last places as if the letters stood between spaces. So of several letters,
            the first one of the alphabet may win"""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    forms = [("({})", "({})"), (" {} ", " {} ")]       # how a letter is written; how its last place is found
    if lmms:
        forms = [("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")]
    for written, place in forms:
        if found := [c for c in options if written.format(c) in answer]:
            return max(found, key=lambda c: answer.rfind(place.format(c))), False   # the first of equal ones, as there
    if len(answer.split()) > 5:
        if found := [c for c, text in options.items() if text.lower() in answer.lower()]:
            return max(found, key=lambda c: answer.lower().rfind(options[c].lower())), False
    return rng.choice([*options]), True


def mmmu_values(s):
    """Normalise a part of an answer to an open question -> list of numbers (rounded to two decimals) or small strings.
    A single letter gets a space before or behind it: it must not be found in every word."""
    s = s.strip()
    try:
        return [round(float(s.replace(",", "")), 2)]
    except ValueError:
        return [" " + s.lower(), s.lower() + " "] if len(s) == 1 else [s.lower()]


def mmmu_open_right(answer, truth):
    """Score an answer to an open question -> is it right? What follows the last "is", "answer", "so" ... of each line
    counts (in the last line also "="), the shortest such end; without any, the whole answer. Also all numbers in it. It
    is right if a true string is part of one of these strings, or a true number equals one of these numbers.

    The program's error: it splits at a period before a capital letter, after it wrote small letters. So only lines are
    split."""
    lines = answer.strip().strip(".").lower().split("\n")
    ends = []
    for i, line in enumerate(lines):
        keys = INDICATORS + ["="] * (i == len(lines) - 1)
        short = ""
        for tail in (line.split(key)[-1].strip() for key in keys if key in line):
            short = tail if not short or len(tail) < len(short) else short            # an empty end may win, as there
        if short and short not in [*":,.!?;'"]:
            ends.append(short)
    ends = ends or [answer.strip().strip(".").lower()]
    parts = ends + [number for end in ends for pattern in _NUMBERS for number in re.findall(pattern, end)]
    said = [v for part in parts for v in mmmu_values(part)]
    true = [v for t in truth for v in mmmu_values(t)]
    return any(v in true if isinstance(v, float) else any(isinstance(t, str) and t in v for t in true) for v in said)


def mmmu_points(answers, questions, lmms=False):
    """Score all answers of a file -> list of 0 and 1. A question without options is open. lmms-eval (75571cf) has an
    error there: it compares single characters of the answer, so every open question is wrong."""
    rng, points = random.Random(42), []
    for answer, q in zip(answers, questions):
        if answer is None or (lmms and not q["options"]):
            points.append(0.0)
        elif q["options"]:
            points.append(float(mmmu_letter(answer, q["options"], rng, lmms)[0] in q["answers"]))
        else:
            points.append(float(mmmu_open_right(answer, q["answers"])))
    return points


def mmmu_totals(answers, questions, points, lmms=False):
    """-> dict: how many letters were guessed by the rule. Scores with many guesses say little about a model."""
    asked = [(a, q["options"]) for a, q in zip(answers, questions) if a is not None and q["options"]]
    return {"guessed": sum(mmmu_letter(a, options, random.Random(0), lmms)[1] for a, options in asked)}

"""Answers yes or no: POPE (Li et al. 2023, arXiv 2305.10355) and MME (Fu et al. 2023, arXiv 2306.13394)."""

import numpy as np

from metrics.certainty import DRAWS, bootstrap

# ---- POPE -----------------------------------------------------------------------------------------------------------

def pope_answer(answer):
    """POPE's rule: "no" if the text before the first period has the word No, no or not (commas removed), else "yes"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if any(w in ("No", "no", "not") for w in words) else "yes"


def pope(answers, truth):
    """Compute POPE's scores -> dict of accuracy, precision, recall, f1 and yes_ratio (share of yes answers). "yes" is
    the positive class. A ratio whose denominator is 0 is 0. truth: "yes" or "no" for each answer"""
    pairs = [(pope_answer(a), t) for a, t in zip(answers, truth, strict=True)]
    tp, fp, fn, tn = (pairs.count(p) for p in (("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")))
    n = max(1, len(pairs))
    return {"accuracy": (tp + tn) / n, "precision": tp / max(1, tp + fp), "recall": tp / max(1, tp + fn),
            "f1": 2 * tp / max(1, 2 * tp + fp + fn), "yes_ratio": (tp + fp) / n}


def pope_by_type(answers, truth, types):
    """Compute pope() of all answers, and add four keys to its dict: f1_types, the f1 score of each question type;
    f1_mean, the mean of these, which papers report; f1_ci95 and f1_mean_ci95, the 95 % intervals of f1 and f1_mean. An
    answer None (the question could not be asked) is wrong. types: {type: indices of its questions}"""
    answers = [{"yes": "no", "no": "yes"}[t] if a is None else a for a, t in zip(answers, truth)]
    f1 = {k: pope([answers[i] for i in at], [truth[i] for i in at])["f1"] for k, at in types.items()}
    whole, mean = f1_intervals(answers, truth, types)
    return pope(answers, truth) | {"f1_ci95": whole, "f1_types": f1, "f1_mean": sum(f1.values()) / len(f1),
                                   "f1_mean_ci95": mean}


def f1_intervals(answers, truth, types):
    """-> 95 % percentile intervals of the f1 of all questions, and of the mean f1 of the types, by bootstrap. The
    questions of each type are resampled by themselves."""
    rng, draws, said = np.random.default_rng(0), [], [*map(pope_answer, answers)]
    for at in types.values():
        counts = np.array([(2 * (said[i] == truth[i] == "yes"), said[i] != truth[i]) for i in at])          # (n, 2)
        draws.append([counts[rng.integers(len(at), size=len(at))].sum(0) for _ in range(DRAWS)])

    def low_high(sums, mean=False):
        f1 = sums[..., 0] / np.maximum(1, sums.sum(-1))
        return np.percentile(f1.mean(0) if mean else f1, (2.5, 97.5)).tolist()
    draws = np.array(draws)                                                                 # (types, DRAWS, 2)
    return low_high(draws.sum(0)), low_high(draws, True)


# ---- MME ------------------------------------------------------------------------------------------------------------

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")


def mme_answer(answer, lmms=False):
    """Read an answer -> "yes", "no" or "other", which is always wrong. MME's own program looks for yes, then for no,
    in the first four characters: so "know" and "not" are no, and "It is yes" is other. It does not remove spaces.

    lmms    lmms-eval strips the answer first, removes all periods, and reads a lone y or n as yes or no"""
    answer = answer.lower()
    if lmms:
        answer = answer.strip().replace(".", "")
        answer = {"y": "yes", "n": "no"}.get(answer, answer)
    return next((word for word in ("yes", "no") if word in answer[:4]), "other")


def mme_totals(answers, questions, points):
    """Compute MME's scores -> dict. An image has two questions, one true and one false. Each subtask has 100 points for
    the share of right answers, and 100 for the share of images with both right: at most 2000 for perception and 800 for
    cognition. questions: each with `type`, the subtask, and `group`, the same for the questions of one image."""
    images = {}                                                              # {subtask: {image: [score of a question]}}
    for q, p in zip(questions, points):
        images.setdefault(q["type"], {}).setdefault(q["group"], []).append(p)
    each = {k: [100 * sum(s) / len(s) + 100 * (sum(s) == len(s) == 2) for s in v.values()] for k, v in images.items()}
    subtasks = {k: sum(v) / len(v) for k, v in each.items()}
    found = {"subtasks": subtasks}
    for name, kinds in (("mme", [*each]), ("perception", PERCEPTION), ("cognition", COGNITION)):
        of = [each[k] for k in kinds if k in each]
        found |= {name: sum(subtasks[k] for k in kinds if k in each), f"{name}_ci95": list(bootstrap(*of))}
    return {**found,
            "images_without_two_questions": sum(len(s) != 2 for v in images.values() for s in v.values())}

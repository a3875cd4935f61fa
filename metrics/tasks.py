"""The table of benchmarks: for each, how answers are scored and which instruction ends a question.

A question is a dict: `answers` (list of true ones), `type`, and where the rule needs them `options` {letter: text},
`group` (which questions belong together), `dataset`, `size` of the image. An answer is a string. It is None if the
question could not be asked: then it is wrong."""

from functools import partial
from statistics import fmean
from typing import NamedTuple

from metrics import boxes, captions, letters, mmmu, reading, words, yes_no
from metrics.certainty import bootstrap, interval, paired

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
UNSURE = "When the provided information is insufficient, respond with 'Unanswerable'.\n" + SHORT
CAPTION = "Provide a one-sentence caption for the provided image."


class Task(NamedTuple):
    points: callable           # (answers, questions) -> a score for each question, 0 to 1 (captions: 0 to 10)
    suffix: str = SHORT        # the instruction behind a question that comes without one
    kind: str = "text"         # what a true answer is: text, letter, yes or no, box, captions
    totals: callable = None    # (answers, questions, points) -> dict: more scores; they may replace accuracy and ci95
    circular: bool = False     # do the questions of a `group` count as one, which is right if all of them are right?


def each(rule):
    """Make a function that scores many answers out of `rule`, which scores one: (answer, question) -> score"""
    return lambda answers, questions: [0.0 if a is None else float(rule(a, q)) for a, q in zip(answers, questions)]


def from_truths(rule, *args):
    """As each(), where the rule needs only the true answers: (answer, list of true answers) -> score"""
    return each(lambda a, q: rule(a, q["answers"], *args))


def from_truth(rule, *args):
    """As each(), where the true answer is one string: (answer, true answer) -> score"""
    return each(lambda a, q: any(rule(a, t, *args) for t in q["answers"]))


def from_options(rule):
    """As each(), where the rule reads a letter: (answer, options) -> letter"""
    return each(lambda a, q: rule(a, q["options"]) in q["answers"])


def letter_task(points, **more):
    return Task(points, LETTER, "letter", **more)


def caption_points(answers, questions):
    return captions.cider([a or "" for a in answers], [q["answers"] for q in questions])


def pope_totals(answers, questions, points):
    return yes_no.pope_by_type(answers, [q["answers"][0] for q in questions], by_type(questions))


def mean_of_types(answers, questions, points):
    """lmms-eval's score of MMStar: the mean of the scores of the question types, not of the questions"""
    types = [[points[i] for i in at] for at in by_type(questions).values()]
    return {"accuracy": fmean(map(fmean, types)), "ci95": [x / len(types) for x in bootstrap(*types)]}


def with_image(answers, questions, points):
    """LLaVA reports ScienceQA for the questions that have an image"""
    own = [p for p, q in zip(points, questions) if q["image"]]
    return {"with_image": fmean(own), "with_image_ci95": list(interval(own)), "n_with_image": len(own)} if own else {}


def vanilla(answers, questions, points):
    """The share of right answers without circular evaluation: each group's first question alone"""
    first = {q["group"]: p for q, p in reversed([*zip(questions, points)])}
    return {"groups": len(first), "vanilla": fmean(first.values()), "vanilla_ci95": list(interval([*first.values()]))}


def pope_right(answer, truth):
    return yes_no.pope_answer(answer) == truth


def mme_right(answer, truth, lmms=False):
    return yes_no.mme_answer(answer, lmms) == truth


def box_task(padded):
    return Task(each(lambda a, q: boxes.refcoco_iou(a, q, padded) >= 0.5), "", "box",
                partial(boxes.refcoco_totals, padded=padded))


_VQA = from_truths(words.vqa_accuracy)                                               # as EvalAI's scorer normalises
_VLMEVAL = from_options(letters.vlmeval_letter)
TASKS = {
    "exact": Task(from_truths(words.exact), ""),
    "vqa": Task(_VQA), "vqa_official": Task(from_truths(words.vqa_accuracy, False)),
    "vqav2": Task(_VQA), "textvqa": Task(_VQA), "vizwiz": Task(_VQA, UNSURE),
    "gqa": Task(from_truths(words.gqa)), "gqa_llava": Task(from_truths(words.gqa, "llava")),
    "gqa_lmms": Task(from_truths(words.gqa, "lmms")),
    "pope": Task(from_truth(pope_right), kind="yes or no", totals=pope_totals),
    "mme": Task(from_truth(mme_right), kind="yes or no", totals=yes_no.mme_totals),
    "mme_lmms": Task(from_truth(mme_right, True), kind="yes or no", totals=yes_no.mme_totals),
    "mmmu": letter_task(mmmu.mmmu_points, totals=mmmu.mmmu_totals),
    "mmmu_lmms": letter_task(partial(mmmu.mmmu_points, lmms=True), totals=partial(mmmu.mmmu_totals, lmms=True)),
    "mmstar": letter_task(from_truth(letters.mmstar_right)), "mmstar_vlmeval": letter_task(_VLMEVAL),
    "mmstar_lmms": letter_task(from_options(letters.lmms_letter), totals=mean_of_types),
    "mmbench": letter_task(_VLMEVAL, totals=vanilla, circular=True),
    "mmbench_lmms": letter_task(from_options(letters.mmbench_lmms_letter), totals=vanilla, circular=True),
    "scienceqa": letter_task(from_options(letters.scienceqa_letter), totals=with_image),
    "scienceqa_lmms": letter_task(from_truth(letters.scienceqa_lmms_right), totals=with_image),
    "scienceqa_vlmeval": letter_task(_VLMEVAL, totals=with_image),
    "ai2d": letter_task(from_truth(letters.ai2d_right)), "ai2d_vlmeval": letter_task(_VLMEVAL),
    "seed": letter_task(from_truth(letters.seed_right)), "seed_vlmeval": letter_task(_VLMEVAL),
    "seed_llava": letter_task(from_truth(letters.seed_right, "llava")),
    "chartqa": Task(from_truth(reading.chartqa_right), "Answer the question with a single word."),
    "docvqa": Task(from_truths(reading.anls)), "docvqa_pix2struct": Task(from_truths(reading.anls, "pix2struct")),
    "infovqa": Task(from_truths(reading.anls)), "infovqa_pix2struct": Task(from_truths(reading.anls, "pix2struct")),
    "ocrbench": Task(each(lambda a, q: reading.ocrbench_right(a, q["answers"], q["dataset"])), "",
                     totals=reading.ocrbench_totals),
    "ocrbench_lmms": Task(each(lambda a, q: reading.ocrbench_right(a, q["answers"], q["dataset"], True)), "",
                          totals=reading.ocrbench_totals),
    "coco": Task(caption_points, CAPTION, "captions"), "nocaps": Task(caption_points, CAPTION, "captions"),
    "refcoco": box_task(False), "refcoco_padded": box_task(True)}


def by_type(questions):
    """-> {type: indices of its questions}, sorted by type"""
    return {k: [i for i, q in enumerate(questions) if q["type"] == k] for k in sorted({q["type"] for q in questions})}


def grouped(task, questions, points):
    """-> the scores that are averaged, and a question for each: one per question, or one per group"""
    if not TASKS[task].circular:
        return points, questions
    groups = {}
    for q, p in zip(questions, points):
        groups.setdefault(q["group"], []).append((p, q))
    return [min(p for p, _ in g) for g in groups.values()], [g[0][1] for g in groups.values()]


def evaluate(task, answers, questions):
    """Score the answers to questions by the rule of a task -> the score of each, dict of the scores of all

    accuracy, ci95    mean score and its 95 % interval         types, types_ci95, counts    the same of each type
    Questions without true answers get no scores: None."""
    if not any(q["answers"] for q in questions):
        return [None] * len(answers), {"n": len(answers), "accuracy": None, "types": {}, "counts": {}}
    points = TASKS[task].points(answers, questions)
    scores, units = grouped(task, questions, points)
    kinds = by_type(units)
    result = {"n": len(answers), "accuracy": fmean(scores), "ci95": list(interval(scores)),
              "types": {k: fmean([scores[i] for i in at]) for k, at in kinds.items()},
              "types_ci95": {k: list(interval([scores[i] for i in at])) for k, at in kinds.items()},
              "counts": {k: len(at) for k, at in kinds.items()}}
    return points, result | (TASKS[task].totals(answers, questions, points) if TASKS[task].totals else {})


def compare(task, answers, others, questions):
    """Test two runs on the same questions by the rule of a task -> dict (certainty.paired): the other run's accuracy,
    how much better `answers` are, and the p of this difference"""
    both = [grouped(task, questions, TASKS[task].points(a, questions))[0] for a in (answers, others)]
    return paired(*both)

"""More questions out of questions: MMBench's rotated options, examples before a question."""

import random
from collections import Counter

from config import stop
from metrics.boxes import read_box


def rotations(question):
    """MMBench's circular evaluation: ask a question once for each of its options, with the options moved by one letter
    each time -> list of questions. Their ids are VLMEvalKit's: 1,000,000 more each time."""
    out, letters = [], [*question["options"]]
    if "" in question["options"].values():
        stop(f"question {question['question_id']!r}: circular evaluation needs the texts of its options")
    lines = "\n".join(f"{c}. {o}" for c, o in question["options"].items())
    if lines not in question["text"]:
        stop(f"question {question['question_id']!r}: circular evaluation needs its options as lines, {lines[:40]!r}")
    for r in range(len(letters)):
        turned = {c: question["options"][letters[(k + r) % len(letters)]] for k, c in enumerate(letters)}
        text = question["text"].replace(lines, "\n".join(f"{c}. {o}" for c, o in turned.items()))
        answers = [letters[(letters.index(a) - r) % len(letters)] for a in question["answers"]]
        number = question["question_id"]
        number = number + r * 10**6 if isinstance(number, int) else f"{number}_{r}"
        out.append(question | dict(question_id=number, text=text, options=turned, answers=answers))
    return out


def choose_examples(question, pool, n):
    """Choose n questions of `pool` as examples for a question -> list; always the same for the same question. Neither
    the question itself is chosen, nor another question about its image, nor one of its group, nor two of one group."""
    def other(q):
        return q["text"] != question["text"] if question["image"] is None else q["image"] != question["image"]

    def group(q):
        return q.get("group", q["question_id"])
    rng, chosen, seen = random.Random(f"shots of {question['question_id']}"), [], {group(question)}
    for q in rng.sample(pool, min(len(pool), 1000)):
        if len(chosen) < n and other(q) and group(q) not in seen:
            chosen.append(q)
            seen.add(group(q))
    if len(chosen) < n:
        stop(f"shots={n}: too few examples about other images for question {question['question_id']!r}")
    return chosen


def example_answer(question):
    """-> the answer that an example shows: the most frequent of its true answers, the first of equal ones. A box that
    was computed from pixels has two decimals, as in LLaVA-1.5's data."""
    if not question["answers"]:
        stop(f"an example needs an answer; question {question['question_id']!r} has none")
    answer = Counter(question["answers"]).most_common(1)[0][0]
    return f"[{', '.join(f'{v:.2f}' for v in read_box(answer))}]" if question.get("size") else answer

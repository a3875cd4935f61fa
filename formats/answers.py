"""Files of answers: those that eval.py wrote, and those of other programs, to score them without a model."""

from collections import Counter

from config import BadSample, stop
from formats.questions.read import ID, pick
from formats.questions.tables import tsv_records
from formats.rows import Rows

EXTRAS = ("options", "group", "dataset", "size")               # of a question; metrics/tasks.py says what they are


def answered_questions(file):
    """Read the questions back from a file of answers that eval.py wrote -> list of questions"""
    rows = answer_rows(file)
    for i, row in enumerate(rows):
        if not {"question_id", "answers", "type", "text"} <= row.keys():
            stop(f"{file}, answer {i} (counted from 0): no true answer beside it; --data=FILE names the questions")
        if not isinstance(row["type"], str) or not all(isinstance(a, str) for a in row["answers"] or ()):
            stop(f"{file}, answer {i} (counted from 0): `type` is a string, `answers` is a list of strings")
    return [{"question_id": row["question_id"], "text": row.get("prompt", ""), "answers": row["answers"],
             "type": row["type"], "image": row.get("image")} | {k: row[k] for k in EXTRAS if k in row} for row in rows]


def answer_rows(file):
    """-> list of the rows of a file of answers"""
    try:
        return tsv_records(file) if str(file).endswith(".tsv") else [*Rows(file)]
    except BadSample as e:
        stop(f"{file}: {e}")


def read_answers(file, questions):
    """Read answers to questions -> for each question its answer, or None. jsonl or json of eval.py or LLaVA
    (question_id, text), of VQA (question_id, answer), of GQA (questionId, prediction); VLMEvalKit's tsv (prediction)"""
    given = {}
    for i, row in enumerate(answer_rows(file)):
        number = pick(row, ID)
        text = next((row[k] for k in ("prediction", "text", "answer") if k in row), "" if "index" in row else 0)
        if number is None or not isinstance(text, str | None):
            stop(f"{file}, answer {i} (counted from 0): it needs question_id and text")
        given.setdefault(str(number), []).append(text)
    asked = Counter(str(q["question_id"]) for q in questions)
    for number, texts in given.items():
        if len(texts) > asked[number]:
            stop(f"{file}: {len(texts)} answers to question {number!r}, which is asked {asked[number]} times")
    return [given[n].pop(0) if given.get(n := str(q["question_id"])) else None for q in questions]


def plain_row(question):
    """-> what a line of the answers file keeps of a question: it can be scored again without the file of questions"""
    names = question["image"] if isinstance(question["image"], tuple) else (question["image"],)
    image = [name if isinstance(name, str | None) else "(bytes in the data file)" for name in names]
    row = {"answers": question["answers"], "image": image[0] if len(image) == 1 else image, "type": question["type"]}
    return row | {k: question[k] for k in EXTRAS if k in question}

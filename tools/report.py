"""Make a page of answers and images from a file that eval.py wrote. The worst question types and answers come first.

    python -m tools.report runs/sft/answers_seeing.jsonl --images=runs/toy/images      # writes answers_seeing.html
    python -m tools.report NEW.jsonl OLD.jsonl --images=runs/toy/images      # which answers of NEW are better or worse

The page of two files has the questions whose score is not the same in both, the number of these in each direction, and
the test of `eval.py --against`. The page is one file. It shows one type or one result by choice, also on a phone.
"""

import base64
import dataclasses
import html
import io
import json
import sys
from collections import Counter
from pathlib import Path

import config
from config import BadSample, setting, stop
from formats.image_files import image_folder, load_image, safe_path
from metrics.certainty import paired
from metrics.tasks import TASKS, grouped
from run.arguments import parse

PAGE = Path(__file__).parent / "page"
RESULTS = {"wrong": "wrong", "part": "partly right", "right": "right"}


@dataclasses.dataclass
class Settings:
    images: str = setting(".", "folder that image names are relative to")
    out: str = setting("", "page to write; empty: beside the file of answers")
    worst: int = setting(8, "answers with the lowest scores to show of each type; of two files: in each direction", 0)
    best: int = setting(4, "answers with the highest scores to show of each type", 1)
    task: str = setting("exact", "of two files: mmbench counts the questions of a group as one", choices=tuple(TASKS))


def inline(path):
    """Make an html img element that contains the image itself. A large image is reduced to 320 x 320 pixels or less."""
    image, file = load_image(path), io.BytesIO()
    image.thumbnail((320, 320))
    kind, tiny = ("png", " class=tiny") if max(image.size) <= 128 else ("jpeg", "")
    image.save(file, kind)
    return f'<img alt=""{tiny} src="data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}">'


# ---- rows -----------------------------------------------------------------------------------------------------------

def matched(rows, others):
    """Give each row the answer and the score of the same question in the other file, as row["other"]. A question that
    the other file lacks has no answer there, so it is wrong, as for `eval.py --against`."""
    def keys(of):
        seen = Counter()
        for row in of:
            name = str(row["question_id"])                       # 1 and "1" are one id, which may be there twice
            seen[name] += 1
            yield name, seen[name]
    found = dict(zip(keys(others), others))
    if more := found.keys() - (own := [*keys(rows)]):
        raise ValueError(f"question {min(more)[0]!r} is in the other file alone")
    missing = {"text": None, "score": 0.0}
    return [row | {"other": found.get(key, missing)} for key, row in zip(own, rows)]


def score_of(row):
    return row["score"] or 0


def change(row):
    """-> how much better the answer is than that of the other file; 0 without another file"""
    return score_of(row) - score_of(row["other"]) if "other" in row else 0


def shown_rows(rows, s):
    """-> the rows of one type that are shown: the lowest scores and the highest; of two files, the largest changes"""
    if "other" in rows[0]:
        ranked = sorted((row for row in rows if change(row)), key=change)
        worse = [row for row in ranked if change(row) < 0]
        return worse[: s.worst] + ranked[len(worse) :][::-1][: s.worst]
    ranked = sorted(rows, key=score_of)
    return ranked[: s.worst] + ranked[s.worst :][-s.best :]


# ---- html -----------------------------------------------------------------------------------------------------------

def answer_html(row):
    text = row["text"]
    return "<i>could not be asked</i>" if text is None else f"<b>{html.escape(text)}</b>" if text else "<i>nothing</i>"


def result_of(score):
    return "none" if score is None else "wrong" if score <= 0 else "right" if score >= 1 else "part"


def card(row, images):
    """Write one row of the answers file as html: image, question, expected answer, given answer, right or wrong."""
    e, score = html.escape, row["score"]
    several = row["image"] if isinstance(row["image"], list) else [row["image"]] if row["image"] else []
    try:
        image = "".join(inline(safe_path(images, name)) for name in several)
    except BadSample as problem:
        image = f"<small>{e(str(problem))}</small><br>"
    result = result_of(score)
    verdict = {"none": "not scored", "part": f"{score_of(row):.0%} right"}.get(result, result)
    question, expected = (row["prompt"].strip().splitlines() or [""])[0], ", ".join(sorted(set(row["answers"] or ())))
    answers, results = f"answered {answer_html(row)}", result
    if "other" in row:
        turn, arrow = ("worse", "down") if change(row) < 0 else ("better", "up")
        answers += f"<br>before {answer_html(row['other'])} <small>{result_of(row['other']['score'])}</small>"
        verdict, results = f"<span class={arrow}>{turn}</span>: {verdict}", f"{result} {turn}"
    return (f'<div class="card {result}" data-result="{results}">{image}{e(question)}<br>expected <b>{e(expected)}</b>'
            f'<br>{answers}<br><small>{verdict}; {e(str(row["question_id"]))}</small></div>')


def mean(rows):
    return sum(map(score_of, rows)) / len(rows)


def directions(rows):
    """-> number of rows that are better than in the other file, and worse"""
    return sum(change(row) > 0 for row in rows), sum(change(row) < 0 for row in rows)


def comparison(types, rows, s):
    """-> html: the test of both files, and a table of the types"""
    scores = [[score_of(row) for row in rows], [score_of(row["other"]) for row in rows]]
    test = paired(*(grouped(s.task, rows, points)[0] for points in scores))
    low, high = test["ci95"]
    better, worse = directions(rows)
    lines = "".join(
        f"<tr><td>{html.escape(kind)}<td>{len(of)}<td>{sum(score_of(row['other']) for row in of) / len(of):.1%}"
        f"<td>{mean(of):.1%}<td class=up>{directions(of)[0]}<td class=down>{directions(of)[1]}"
        for kind, of in types)
    return (f"<p>Before: {test['accuracy']:.1%}. <span class=up>{better} better</span>, <span class=down>{worse} worse"
            f"</span>. Difference {100 * test['difference']:+.1f} points (95 %: {100 * low:+.1f} to {100 * high:+.1f})"
            f"; p = {test['p']:.2g} ({test['test']}).</p><table><tr><th>type<th>n<th>before<th>now<th>better<th>worse"
            f"{lines}</table>")


def choices(name, values):
    options = "".join(f'<option value="{html.escape(v)}">{html.escape(text)}' for v, text in values)
    return f"<label>{name} <select><option value=''>all{options}</select></label>"


def page(rows, title, s):
    """Make one html page from the rows of an answers file. The page contains its images and needs no other file. The
    scores are None if the questions had no true answers."""
    e, types = html.escape, {}
    for row in rows:
        types.setdefault(row["type"], []).append(row)
    two, scored = "other" in rows[0], any(row["score"] is not None for row in rows)
    lost = sum(row["text"] is None for row in rows)
    if two and not scored:
        raise ValueError("its answers have no scores to compare")
    ranked = sorted(types.items(), key=lambda item: (directions(item[1])[0] - directions(item[1])[1], mean(item[1]),
                                                     item[0]))
    results = {"worse": "worse", "better": "better"} if two else {}
    out = ["<!doctype html><html lang=en><meta charset=utf-8>",
           f'<meta name=viewport content="width=device-width, initial-scale=1"><title>{e(title)}</title>',
           f"<style>{(PAGE / 'report.css').read_text('utf-8')}</style>",
           f"<h1>{f'{mean(rows):.1%} of ' if scored else ''}{len(rows)} questions</h1><p>{e(title)}"
           + f"<br>{lost} could not be asked{' and count as wrong' if scored else ''}." * (lost > 0),
           comparison(ranked, rows, s) if two else "", "<nav>", choices("type", [(k, k) for k in sorted(types)]),
           choices("result", [*results.items(), *RESULTS.items()]), "<small></small></nav>"]
    for kind, of in ranked:
        shown = shown_rows(of, s)
        better, worse = directions(of)
        wrong = f"{sum(score_of(row) < 1 for row in of)} of {len(of)} not right" if scored else "not scored"
        about = f"{worse} worse, {better} better" if two else wrong
        out += [f'<section data-type="{e(kind)}"><h2>{e(kind)} {f"{mean(of):.1%} " if scored else ""}<small>{about}; '
                f"{len(shown)} shown</small></h2><div class=cards>", *(card(row, s.images) for row in shown),
                "</div></section>"]
    return "\n".join([*out, f"<script>\n{(PAGE / 'report.js').read_text('utf-8')}</script>"]) + "\n"


def read(file):
    """-> rows of a file of answers that eval.py wrote"""
    try:
        rows = [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]
        for row in rows:
            if missing := {"question_id", "prompt", "text", "score", "answers", "image", "type"} - row.keys():
                raise KeyError(min(missing))
            score_of(row) + 0.0, row["type"] + row["prompt"] + (row["text"] or "") + "".join(row["answers"] or ())
        return rows or stop(f"{file} is not a file of answers that eval.py wrote: it is empty")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        stop(f"{file} is not a file of answers that eval.py wrote: {type(e).__name__} {e}")


def main(argv):
    files = [a for a in argv if not a.startswith("--")]
    s = parse(Settings, [a for a in argv if a.startswith("--")], __doc__)
    if len(files) not in (1, 2):
        stop("usage: python -m tools.report ANSWERS.jsonl [OTHER.jsonl] --images=DIR")
    config.check_ranges(s)
    image_folder(s.images)
    names = [str(Path(file).with_suffix("")) for file in files]
    out = Path(s.out or names[0] + "_against" * (len(files) == 2) + ".html")
    try:
        rows = [read(file) for file in files]
        rows = matched(*rows) if len(files) == 2 else rows[0]
        # an answer may contain half of a surrogate pair. UTF-8 cannot encode it, so it is written as an escape
        text = page(rows, " against ".join(names), s).encode("utf-8", "backslashreplace")
        out.write_bytes(text)
    except OSError as e:
        stop(f"{e.filename}: {e.strerror}")
    except KeyError as key:                                      # of answers to another task
        stop(f"{' and '.join(files)}: the answers have no {key}, which task={s.task} reads")
    except ValueError as e:
        stop(f"{' and '.join(files)}: {e}")
    print(out)


if __name__ == "__main__":
    with config.one_line_errors():
        main(sys.argv[1:])

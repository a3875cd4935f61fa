"""Score a model on a file of questions.

    python eval.py --model=runs/sft                         # the toy world's held-out questions
    python eval.py --model=runs/sft --blind                 # the same with the picture's features set to zero
    python eval.py --model=runs/sft --shuffled              # the same with the picture of another question
    python eval.py --model=DIR --task=vqa --data=FILE.jsonl --images=DIR [--answers=FILE]
    torchrun --nproc_per_node=8 eval.py ...                 # the questions shared out

The file is jsonl: question_id, image, text, answer (or answers, or POPE's label), and optionally type (or category).
Tasks: exact (exact match), vqa (VQA accuracy, EvalAI's normalisation), vqa_official, pope (yes or no). The answers are
written as jsonl, and beside them a page that holds its pictures, worst types first. The last line is JSON.
"""

import base64
import dataclasses
import html
import io
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

import config
import engine
import generate
import metrics
from config import BadSample
from formats import strict_json
from formats.card import remember
from images import image_folder, load_image, safe_path
from run import folder

SCORES = {"exact": metrics.exact, "vqa": metrics.vqa_accuracy,
          "vqa_official": lambda said, answers: metrics.vqa_accuracy(said, answers, evalai=False),
          "pope": lambda said, answers: float(metrics.pope_answer(said) == answers[0])}
HOW = {"seeing": "each question with its own picture", "blind": "the features of every picture set to zero",
       "shuffled": "each question with the picture of another one"}


@dataclasses.dataclass
class Settings:
    model: str = "runs/sft"        # a run, its model/ or adapter/, any LLaVA folder or adapter
    task: str = "exact"            # exact, vqa, vqa_official, pope
    data: str = ""                 # jsonl of questions; empty: the toy world's held-out ones
    images: str = ""               # folder that image names are relative to; empty: the folder of the data
    answers: str = ""              # file to write; empty: answers_HOW.jsonl in the run, or in answers/ here if locked
    blind: bool = False            # image features set to zero: what can be guessed from the words
    shuffled: bool = False         # the picture of another question: the fairer guess
    limit: int = 0                 # questions; 0 = all
    batch_size: int = 64           # questions at a time
    max_new_tokens: int = 32
    template: str = ""             # empty = what the model was trained with
    system: str | None = None      # none = what the model was trained with
    report: bool = True            # write the page
    device: str = "auto"
    dtype: str = "auto"
    kernels: str = "auto"          # torch, triton; auto = triton on a GPU


# ---- questions -----------------------------------------------------------------------------------------------------

def read_questions(file, task):
    """-> rows with question_id, text, answers (a list), image (or None) and type"""
    try:
        lines = Path(file).read_text("utf-8-sig").split("\n")    # not splitlines, which also cuts inside strings
    except OSError:
        config.stop(f"no question file {file}")
    except UnicodeDecodeError:
        config.stop(f"{file} is not text in utf-8")
    rows = []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {n}"
        try:
            row = strict_json.strict_json(line, where)
        except ValueError as e:
            config.stop(str(e))
        row = row if isinstance(row, dict) else {}
        answers = next((row[k] for k in ("answers", "answer", "label") if k in row), None)
        answers = [answers] if isinstance(answers, str) else answers
        strings = [row.get("text"), *answers] if isinstance(answers, list) and answers else [None]
        if "question_id" not in row or not all(isinstance(t, str) for t in strings):
            config.stop(f"{where}: a question needs question_id, text, and answer or a list of answers, all strings")
        if not isinstance(row.get("image"), str | None):
            config.stop(f"{where}: image is the name of one file, not {row['image']!r}")
        if task == "pope":
            answers = [a.strip().lower() for a in answers]
            if answers not in (["yes"], ["no"]):
                config.stop(f"{where}: POPE's answer is yes or no, not {answers[0]!r}")
        rows.append(dict(question_id=row["question_id"], text=row["text"], answers=answers,
                         image=row.get("image") or None, type=str(row.get("type") or row.get("category") or "all")))
    if not rows:
        config.stop(f"{file} holds no questions")
    return rows


def toy_questions(world, task):
    """The toy world's held-out questions, drawn if need be -> question file, folder of images"""
    from demo import toy
    file = Path("runs/toy/questions.jsonl")
    yes_or_no = file.with_name("questions_pope.jsonl")
    if world.rank == 0:
        try:
            toy.write_world("runs/toy", "test")
            lines = file.read_text("utf-8").splitlines(keepends=True)
            write(yes_or_no, "".join(q for q in lines if json.loads(q)["answer"] in ("yes", "no")))
        except OSError as e:
            config.stop(f"the toy world cannot be drawn in runs/toy: {e.strerror or e}")
    world.gather(None)                                           # nobody reads before all is written
    return str(yes_or_no if task == "pope" else file), "runs/toy/images"


def other_pictures(rows):
    """For every question the picture of another one, never its own; what has no picture gets none."""
    pictures = sorted({r["image"] for r in rows} - {None})
    if len(pictures) < 2:
        config.stop("--shuffled needs at least two different pictures")
    half = len(pictures) // 2
    other = {n: pictures[(i + half) % len(pictures)] for i, n in enumerate(pictures)}
    return [other.get(r["image"]) for r in rows]


# ---- answers -------------------------------------------------------------------------------------------------------

def ask(speaker, rows, names, images, max_new_tokens):
    """-> the answers to `rows`, shown the pictures `names`; None where a question cannot be asked"""
    prompts, pictures, asked = [], [], []
    for i, (row, name) in enumerate(zip(rows, names)):
        try:
            shown = [speaker.pixels(safe_path(images, name))] if name else []
            prompts.append(speaker.prompt([(generate.with_marker(row["text"], len(shown)), None)], len(shown)))
        except BadSample as e:
            print(f"question {row['question_id']}: {e}; counted as wrong", file=sys.stderr)
            continue
        pictures += shown
        asked.append(i)
    said = dict(zip(asked, speaker.answers(prompts, pictures, max_new_tokens) if prompts else []))
    return [said.get(i) for i in range(len(rows))]


def mean(values):
    return sum(values) / len(values)


def by_type(rows):
    """-> {type: indices of its questions}"""
    kinds = defaultdict(list)
    for i, r in enumerate(rows):
        kinds[r["type"]].append(i)
    return dict(sorted(kinds.items()))


def pope_numbers(said, rows, kinds):
    """Precision, recall, F1, share of yes; and the F1 of each category, whose mean is what papers quote. A question
    that could not be asked counts as answered wrongly, whatever was right."""
    truth = [r["answers"][0] for r in rows]
    said = [a if a is not None else {"yes": "no", "no": "yes"}[t] for a, t in zip(said, truth)]
    f1 = {k: metrics.pope([said[i] for i in at], [truth[i] for i in at])["f1"] for k, at in kinds.items()}
    return metrics.pope(said, truth) | {"f1_types": f1, "f1_mean": mean(f1.values())}


def write(path, text):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, "utf-8", "backslashreplace")             # json may hold a lone surrogate, utf-8 may not
    os.replace(tmp, path)


def place(s, name):
    """The file for the answers: the one asked for, or one in the run. A published model may lie where only reading is
    allowed; then they go to answers/ here, and a line says so. All before the first question is asked."""
    run = Path(s.model)
    if not run.exists():                     # a name of the hub, and no folder here may come to be called so
        run = Path("answers", run.name)
    elif run.name in ("model", "adapter"):
        run = run.parent
    out = Path(s.answers or run / f"answers_{name}.jsonl")
    problem = f"{out} is no file" if out.exists() and not out.is_file() else folder.unwritable(out.parent)  # a device!
    if problem and not s.answers:
        print(f"{problem}; the answers go to {Path('answers', run.resolve().name)}", file=sys.stderr)
        out = Path("answers", run.resolve().name, out.name)
        problem = folder.unwritable(out.parent)
    if problem:
        config.stop(f"{problem}: --answers=FILE says where the answers may go")
    return out


def main(s):
    if s.task not in SCORES:
        config.stop(f"task={s.task}: {', '.join(SCORES)}")
    if s.blind and s.shuffled:
        config.stop("--blind and --shuffled are two different controls: choose one")
    config.within(s, {"batch_size": (1, None), "limit": (0, None), "max_new_tokens": (1, None)})
    world = engine.start(s.device, s.dtype)
    data, images = (s.data, s.images or str(Path(s.data).parent)) if s.data else toy_questions(world, s.task)
    rows = read_questions(data, s.task)[: s.limit or None]
    image_folder(images)
    how = "blind" if s.blind else "shuffled" if s.shuffled else "seeing"
    names = other_pictures(rows) if s.shuffled else [r["image"] for r in rows]
    speaker = generate.Chat(s.model, s.device, s.dtype, s.template, s.system, s.kernels)
    name = how if s.task == "exact" else f"{s.task}_{how}"
    out = place(s, name) if world.rank == 0 else None
    if s.blind:                                                  # zeros where the tower's features would be
        speaker.model.vision_tower.register_forward_hook(lambda module, args, out: torch.zeros_like(out))

    code, began, mine, heard = 0, time.time(), range(world.rank, len(rows), world.size), []
    for i in range(0, len(mine), s.batch_size):
        at = mine[i : i + s.batch_size]
        heard += zip(at, ask(speaker, [rows[j] for j in at], [names[j] for j in at], images, s.max_new_tokens))
    said = [a for _, a in sorted((i, a) for rank in world.gather(heard) for i, a in rank)]
    if said.count(None) == len(said):
        config.stop(f"none of the {len(rows)} questions could be asked; the lines above say why")
    points = [0.0 if a is None else SCORES[s.task](a, r["answers"]) for a, r in zip(said, rows)]

    kinds = by_type(rows)
    result = {"task": s.task, "n": len(rows), "accuracy": mean(points), "how": how,
              "types": {k: mean([points[i] for i in at]) for k, at in kinds.items()},
              "counts": {k: len(at) for k, at in kinds.items()}, "unreadable": said.count(None), "model": s.model,
              "data": data, "template": speaker.template, "seconds": round(time.time() - began, 1)}
    if s.task == "pope":
        result |= pope_numbers(said, rows, kinds)
    if world.rank == 0:
        page = out.with_name(f"report_{name}.html")
        lines = [json.dumps({"question_id": r["question_id"], "prompt": r["text"], "text": a, "score": p,
                             "answers": r["answers"], "image": n, "type": r["type"]}) + "\n"
                 for r, a, p, n in zip(rows, said, points, names)]
        try:
            write(out, "".join(lines))
            if s.report:
                write(page, report(rows, said, points, names, images, result))
            print(f"answers in {out}" + (f", a page in {page}" if s.report else ""), file=sys.stderr)
        except OSError as e:                                     # a full disk does not cost the score
            print(f"error: {e.filename or out} could not be written: {e.strerror}", file=sys.stderr)
            code = 1
        print(json.dumps(result), flush=True)
        if not s.answers:
            remember(out.parent, f"{Path(data).name} {name}", result, speaker.cfg)
    return code


# ---- the page ------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1080px; padding: 0 1em; color: #222 }
h2 { margin: 1.6em 0 .4em } h2 small { font-weight: normal } small { color: #666 }
td { padding: 1px 14px 1px 0 } .number { text-align: right }
.bar { background: #e4e4e4; width: 240px } .bar div { background: #48a; height: 12px }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 12px }
.card { border: 1px solid #ddd; border-left: 5px solid #c33; border-radius: 4px; padding: 8px; overflow-wrap: anywhere }
.partly { border-left-color: #da2 } .right { border-left-color: #2a2 }
img { display: block; max-width: 100%; margin-bottom: 6px } .tiny { width: 144px; image-rendering: pixelated }
"""


def inline(path):
    """A picture file -> an img element that holds it, shrunk to what a card can show."""
    image, file = load_image(path), io.BytesIO()
    image.thumbnail((320, 320))
    kind, tiny = ("png", " class=tiny") if max(image.size) <= 128 else ("jpeg", "")
    image.save(file, kind)
    return f'<img alt=""{tiny} src="data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}">'


def card(row, said, point, name, images):
    """One question: picture, text, what was expected, what was answered, right or wrong."""
    e = html.escape
    try:
        picture = inline(safe_path(images, name)) if name else ""
    except BadSample as problem:
        picture = f"<small>{e(str(problem))}</small><br>"
    kind, verdict = "wrong", "wrong"
    if point > 0:
        kind, verdict = ("right", "right") if point >= 1 else ("partly", f"{point:.0%} right")
    reply = "<i>could not be asked</i>" if said is None else f"<b>{e(said)}</b>" if said else "<i>nothing</i>"
    question, expected = (row["text"].strip().splitlines() or [""])[0], ", ".join(sorted(set(row["answers"])))
    return (f'<div class="card {kind}">{picture}{e(question)}<br>expected <b>{e(expected)}</b><br>answered {reply}<br>'
            f'<small>{verdict}; {e(str(row["question_id"]))}</small></div>')


def report(rows, said, points, names, images, result, worst=8, best=4):
    """One self-contained page: types by score, worst first; of each its worst answers and its best."""
    e = html.escape
    kinds = sorted(by_type(rows).items(), key=lambda kind: mean([points[i] for i in kind[1]]))
    lost = f" {result['unreadable']} could not be asked and count as wrong." if result["unreadable"] else ""
    out = [f"<!doctype html><meta charset=utf-8><title>{e(result['model'])}</title><style>{STYLE}</style>",
           f"<h1>{result['accuracy']:.1%} of {result['n']} questions</h1>",
           f"<p>{e(result['model'])} was asked {e(result['data'])}: {HOW[result['how']]}. "
           f"Task {e(result['task'])}, template {e(result['template'])}.{lost}</p><table>"]
    for kind, at in kinds:
        share = f"{mean([points[i] for i in at]):.1%}"
        out.append(f'<tr><td>{e(kind)}<td class=number>{share}<td class=number>{len(at)}'
                   f'<td><div class=bar><div style="width:{share}"></div></div>')
    out.append("</table>")
    for kind, at in kinds:
        ranked = sorted(at, key=lambda i: points[i])
        chosen = ranked[:worst] + ranked[worst:][-best:]
        wrong = sum(points[i] < 1 for i in at)
        out.append(f"<h2>{e(kind)} <small>{wrong} of {len(at)} not right; {len(chosen)} shown</small></h2>")
        out += ["<div class=cards>", *(card(rows[i], said[i], points[i], names[i], images) for i in chosen), "</div>"]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    with config.one_line_errors():
        sys.exit(engine.finish(main(config.parse(Settings, sys.argv[1:], __doc__))))

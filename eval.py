"""Score a model on a file of questions.

    python eval.py --model=runs/sft                                       # the toy world's held-out questions
    python eval.py --model=runs/sft --blind                               # the same with the picture's features set to zero
    python eval.py --model=runs/sft --shuffled                            # the same with another question's picture
    python eval.py --model=DIR --task=vqa --data=FILE.jsonl --images=DIR [--answers=FILE]

The file is jsonl: question_id, image, text, answer or answers, and optionally type. Tasks: exact (exact match), vqa (VQA accuracy,
EvalAI's normalisation), vqa_official, pope (yes or no; per category in `type`). Prints one line of JSON last; writes the answers as
jsonl and a page with pictures, worst types first, beside it.
"""

import base64
import dataclasses
import html
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

import answer
import config
import metrics
from data import BadSample, safe_path


@dataclasses.dataclass
class Settings:
    model: str = "runs/sft"        # a run, its model/, or any LLaVA folder
    task: str = "exact"            # exact, vqa, vqa_official, pope
    data: str = ""                 # jsonl of questions; empty: the toy world's held-out ones
    images: str = ""               # folder that image names are relative to; empty: the folder of the data
    answers: str = ""              # where to write; empty: answers_<how>.jsonl in the model's run
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


def read_questions(s):
    if not s.data:
        sys.path.insert(0, str(Path(__file__).resolve().parent / "demo"))
        import toy
        toy.write("runs/toy", "test")
        s.data, s.images = "runs/toy/questions.jsonl", "runs/toy/images"
    s.images = s.images or str(Path(s.data).parent)
    if not Path(s.data).is_file():
        config.stop(f"no question file {s.data}")
    rows = []
    for n, line in enumerate(Path(s.data).read_text("utf-8").splitlines(), 1):
        try:
            row = config.strict_json(line, f"{s.data}, line {n}")
            row["answers"] = row["answers"] if "answers" in row else [row["answer"]]
            assert all(isinstance(a, str) for a in row["answers"]) and row["answers"] and isinstance(row["text"], str) and "question_id" in row
        except ValueError as e:
            config.stop(str(e))
        except (KeyError, AssertionError, TypeError):
            config.stop(f"{s.data}, line {n}: a question needs question_id, text, and answer or a list of answers, all of them strings")
        if s.task == "pope" and row["answers"][0] not in ("yes", "no"):
            config.stop(f"{s.data}, line {n}: POPE's answers are yes or no, not {row['answers'][0]!r}")
        rows.append(row)
    if not rows:
        config.stop(f"{s.data} holds no questions")
    return rows[: s.limit or None]


def shuffle_pictures(rows):
    """Give every question the picture of another one: the next question in a fixed order that shows a different picture."""
    names = [r.get("image") for r in rows]
    pictures = sorted({n for n in names if n})
    if len(pictures) < 2:
        config.stop("--shuffled needs at least two different pictures")
    half = len(pictures) // 2
    other = {n: pictures[(i + half) % len(pictures)] for i, n in enumerate(pictures)}
    return [other.get(n) for n in names]


def main(s):
    if s.task not in ("exact", "vqa", "vqa_official", "pope"):
        config.stop(f"task={s.task}: exact, vqa, vqa_official or pope")
    if s.blind and s.shuffled:
        config.stop("--blind and --shuffled are two different controls: choose one")
    rows = read_questions(s)
    speaker = answer.load(s.model, s.device, s.dtype, s.template, s.system)
    how = "blind" if s.blind else "shuffled" if s.shuffled else "seeing"
    names = shuffle_pictures(rows) if s.shuffled else [r.get("image") for r in rows]
    if s.blind:                                                  # zeros where the tower's features would be
        speaker.model.vision_tower.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    said, began, problems = [], time.time(), 0
    for i in range(0, len(rows), s.batch_size):
        prompts, pictures, at = [], [], []
        for j in range(i, min(i + s.batch_size, len(rows))):
            try:
                shown = [speaker.picture(safe_path(s.images, names[j]))] if names[j] else []
                prompts.append(speaker.prompt([(answer.with_marker(rows[j]["text"], len(shown)), None)], len(shown)))
                pictures += shown
                at.append(j)
            except BadSample as e:
                problems += 1
                print(f"question {rows[j]['question_id']}: {e}; counted as wrong", file=sys.stderr)
        replies = dict(zip(at, speaker.say(prompts, pictures, s.max_new_tokens) if prompts else []))
        said += [replies.get(j, "") for j in range(i, min(i + s.batch_size, len(rows)))]

    score = {"exact": metrics.exact, "vqa": metrics.vqa_accuracy, "vqa_official": lambda a, b: metrics.vqa_accuracy(a, b, evalai=False),
             "pope": lambda a, b: float(metrics.pope_answer(a) == b[0])}[s.task]
    points = [score(a, r["answers"]) if a or s.task == "pope" else 0.0 for a, r in zip(said, rows)]
    kinds = defaultdict(list)
    for p, r in zip(points, rows):
        kinds[r.get("type", r.get("category", "all"))].append(p)
    result = {"task": s.task, "n": len(rows), "accuracy": sum(points) / len(points), "how": how,
              "types": {k: sum(v) / len(v) for k, v in sorted(kinds.items())}, "counts": {k: len(v) for k, v in sorted(kinds.items())},
              "unreadable": problems, "seconds": round(time.time() - began, 1), "model": s.model, "template": speaker.template}
    if s.task == "pope":
        result |= metrics.pope(said, [r["answers"][0] for r in rows])

    run = Path(s.model)
    out = Path(s.answers) if s.answers else (run.parent if run.name == "model" else run) / f"answers_{how}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = out.with_name(out.name + ".tmp")
    tmp.write_text("".join(json.dumps({"question_id": r["question_id"], "prompt": r["text"], "text": a, "answers": r["answers"], "score": p,
                                       "image": n, "type": r.get("type")}) + "\n" for r, a, p, n in zip(rows, said, points, names)), "utf-8")
    os.replace(tmp, out)
    if s.report:
        page = out.with_suffix(".html")
        page.write_text(report(rows, said, points, names, result, s.images), "utf-8")
        print(f"answers in {out}, a page in {page}", file=sys.stderr)
    print(json.dumps(result))


def report(rows, said, points, names, result, images, per_type=12):
    """One self-contained page: types by score, worst first; of each the wrong answers first, with their pictures inside the page."""
    kinds = defaultdict(list)
    for i, r in enumerate(rows):
        kinds[r.get("type", r.get("category", "all"))].append(i)
    order = sorted(kinds, key=lambda k: sum(points[i] for i in kinds[k]) / len(kinds[k]))
    e = html.escape
    out = [f"<!doctype html><meta charset=utf-8><title>{e(result['model'])}</title><style>body{{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1080px;"
           "padding:0 1em;color:#222}h2{margin:1.6em 0 .4em}.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:12px}.card{border:1px solid "
           "#ddd;border-left:5px solid #2a2;border-radius:4px;padding:8px;overflow-wrap:anywhere}.wrong{border-left-color:#c33}img{width:144px;image-rendering:pixelated;"
           "display:block;margin-bottom:6px}table{border-collapse:collapse}td,th{padding:2px 14px 2px 0;text-align:left}.bar{background:#e4e4e4;width:240px}.bar div{background:"
           "#48a;height:12px}small{color:#777}</style>",
           f"<h1>{result['accuracy']:.1%} of {result['n']}</h1><p>{e(result['model'])}, task {e(result['task'])}, {e(result['how'])}, template {e(result['template'])}</p><table>"]
    for k in order:
        share = sum(points[i] for i in kinds[k]) / len(kinds[k])
        out.append(f"<tr><td>{e(str(k))}<td>{share:.1%}<td>{len(kinds[k])}<td><div class=bar><div style='width:{share:.1%}'></div></div>")
    out.append("</table>")
    for k in order:
        chosen = sorted(kinds[k], key=lambda i: points[i])[:per_type]
        wrong = sum(points[i] < 1 for i in kinds[k])
        out.append(f"<h2>{e(str(k))} <small>{wrong} of {len(kinds[k])} not right; {len(chosen)} shown</small></h2><div class=cards>")
        for i in chosen:
            picture = ""
            if names[i]:
                try:
                    path = safe_path(images, names[i])
                    kind = {"jpg": "jpeg"}.get(path.rsplit(".", 1)[-1].lower(), path.rsplit(".", 1)[-1].lower())
                    picture = f"<img alt='' src='data:image/{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}'>"
                except BadSample as problem:
                    picture = f"<small>{e(str(problem))}</small>"
            out.append(f"<div class='card{'' if points[i] >= 1 else ' wrong'}'>{picture}{e(rows[i]['text'].splitlines()[0])}<br>expected <b>{e(', '.join(sorted(set(rows[i]['answers']))))}"
                       f"</b><br>answered <b>{e(said[i]) or '(nothing)'}</b></div>")
        out.append("</div>")
    return "\n".join(out)


if __name__ == "__main__":
    main(config.load(Settings, sys.argv[1:], __doc__))

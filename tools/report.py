"""Make a page of answers and images from a file that eval.py wrote. The worst question types and answers come first.

    python -m tools.report runs/sft/answers_seeing.jsonl --images=runs/toy/images      # writes answers_seeing.html
"""

import base64
import dataclasses
import html
import io
import json
import sys
from pathlib import Path

import config
from config import BadSample, setting, stop
from images import image_folder, load_image, safe_path

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1080px; padding: 0 1em; color: #222 }
h2 { margin: 1.6em 0 .4em } h2 small { font-weight: normal } small { color: #666 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 12px }
.card { border: 1px solid #ddd; border-left: 5px solid #c33; border-radius: 4px; padding: 8px; overflow-wrap: anywhere }
.card.right { border-left-color: #2a2 }
img { display: block; max-width: 100%; margin-bottom: 6px } .tiny { width: 144px; image-rendering: pixelated }
"""


@dataclasses.dataclass
class Settings:
    images: str = setting(".", "folder that image names are relative to")
    worst: int = setting(8, "answers with the lowest scores to show of each type", 0)
    best: int = setting(4, "answers with the highest scores to show of each type", 1)


def inline(path):
    """Make an html img element that contains the image itself. A large image is reduced to 320 x 320 pixels or less."""
    image, file = load_image(path), io.BytesIO()
    image.thumbnail((320, 320))
    kind, tiny = ("png", " class=tiny") if max(image.size) <= 128 else ("jpeg", "")
    image.save(file, kind)
    return f'<img alt=""{tiny} src="data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}">'


def card(row, images):
    """Write one row of the answers file as html: image, question, expected answer, given answer, right or wrong."""
    e, text = html.escape, row["text"]
    several = row["image"] if isinstance(row["image"], list) else [row["image"]] if row["image"] else []
    try:
        image = "".join(inline(safe_path(images, name)) for name in several)
    except BadSample as problem:
        image = f"<small>{e(str(problem))}</small><br>"
    score = row["score"]
    verdict = ("not scored" if score is None else "wrong" if score <= 0 else "right" if score >= 1 else
               f"{score:.0%} right")
    answer = "<i>could not be asked</i>" if text is None else f"<b>{e(text)}</b>" if text else "<i>nothing</i>"
    question, expected = (row["prompt"].strip().splitlines() or [""])[0], ", ".join(sorted(set(row["answers"] or ())))
    return (f'<div class="card {verdict}">{image}{e(question)}<br>expected <b>{e(expected)}</b><br>answered {answer}'
            f'<br><small>{verdict}; {e(str(row["question_id"]))}</small></div>')


def page(rows, title, s):
    """Make one html page from the rows of an answers file. The page contains its images and needs no other file. The
    scores are None if the questions had no true answers."""
    e, types = html.escape, {}
    for row in rows:
        types.setdefault(row["type"], []).append(row)

    def mean(of):
        return sum(row["score"] or 0 for row in of) / len(of)

    if not rows:
        raise ValueError("it is empty")
    scored, lost = any(row["score"] is not None for row in rows), sum(row["text"] is None for row in rows)
    out = [f"<!doctype html><meta charset=utf-8><title>{e(title)}</title><style>{STYLE}</style>",
           f"<h1>{f'{mean(rows):.1%} of ' if scored else ''}{len(rows)} questions</h1><p>{e(title)}",
           f". {lost} could not be asked{' and count as wrong' if scored else ''}.</p>"]
    for kind in sorted(types, key=lambda kind: (mean(types[kind]), kind)):
        ranked = sorted(types[kind], key=lambda row: row["score"] or 0)
        shown = ranked[: s.worst] + ranked[s.worst :][-s.best :]
        wrong = f"{sum(row['score'] < 1 for row in ranked)} of {len(ranked)} not right" if scored else "not scored"
        out += [f"<h2>{e(kind)} {f'{mean(ranked):.1%} ' if scored else ''}<small>{wrong}; {len(shown)} shown</small>",
                "</h2><div class=cards>", *(card(row, s.images) for row in shown), "</div>"]
    return "\n".join(out) + "\n"


def main(argv):
    files = [a for a in argv if not a.startswith("--")]
    s = config.parse(Settings, [a for a in argv if a.startswith("--")], __doc__)
    if len(files) != 1:
        stop("usage: python -m tools.report ANSWERS.jsonl --images=DIR")
    config.check_ranges(s)
    image_folder(s.images)
    file = Path(files[0])
    try:
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        # an answer may contain half of a surrogate pair. UTF-8 cannot encode it, so it is written as an escape
        text = page(rows, str(file.with_suffix("")), s).encode("utf-8", "backslashreplace")
        file.with_suffix(".html").write_bytes(text)
    except OSError as e:
        stop(f"{e.filename}: {e.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        stop(f"{file} is not a file of answers that eval.py wrote: {type(e).__name__} {e}")
    print(file.with_suffix(".html"))


if __name__ == "__main__":
    with config.one_line_errors():
        main(sys.argv[1:])

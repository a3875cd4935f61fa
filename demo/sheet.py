"""Draw images of the toy world with questions and a model's answers. The answers come from a file that eval.py wrote.

    python demo/sheet.py runs/sft/answers_seeing.jsonl OUT.png     # right answers are green, wrong answers red
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import one_line_errors, stop
from run.arguments import positional

# ZOOM: how many times larger an image is drawn. In pixels: width of a column, height of a line, gap between images
ZOOM, WIDTH, LINE, GAP = 3, 680, 22, 18
IMAGES = Path("runs/toy/images")


def draw_sheet(rows, columns=2, images=6, questions=8):
    """Draw rows of a file of answers -> PIL image. It shows the first images that have enough questions, with their
    questions and the model's answers. After a wrong answer it shows the true answer."""
    by_image = {}
    for row in rows:
        by_image.setdefault(row["image"], []).append(row)
    chosen = [(name, asked) for name, asked in by_image.items() if len(asked) >= questions - 1][:images]
    if not chosen:
        raise ValueError(f"no image with {questions - 1} questions")
    side = 72 * ZOOM
    height = max(side, questions * LINE) + GAP
    out = Image.new("RGB", (columns * WIDTH + GAP, -(-len(chosen) // columns) * height + GAP), "white")
    d, font = ImageDraw.Draw(out), ImageFont.load_default(size=14)
    for n, (name, asked) in enumerate(chosen):
        x, y = GAP + n % columns * WIDTH, GAP + n // columns * height
        out.paste(Image.open(IMAGES / name).convert("RGB").resize((side, side), Image.NEAREST), (x, y))
        for i, row in enumerate(asked[:questions]):
            at = (x + side + 12, y + i * LINE)
            question = row["prompt"].splitlines()[0].replace(" to the left or to the right of ", " left or right of ")
            d.text(at, question, fill=(90, 90, 90), font=font)
            answer = row["text"] + ("" if row["score"] >= 1 else f" (it is {row['answers'][0]})")
            d.text((at[0] + d.textlength(question, font=font) + 8, at[1]), answer,
                   fill=(20, 130, 50) if row["score"] >= 1 else (200, 40, 40), font=font)
    return out


def main(argv):
    if len(argv) != 2:
        stop("usage: python demo/sheet.py ANSWERS.jsonl OUT.png")
    file, target = argv
    try:
        drawn = draw_sheet([json.loads(line) for line in Path(file).read_text("utf-8").splitlines()])
    except (OSError, ValueError, KeyError, TypeError) as e:
        stop(f"{file}, or an image it names, does not come from eval.py on the toy world: {e}")
    try:
        drawn.save(target)
    except (OSError, ValueError) as e:
        stop(f"cannot write {target}: {e}")
    print(target)


if __name__ == "__main__":
    with one_line_errors():
        main(positional(sys.argv[1:], __doc__))

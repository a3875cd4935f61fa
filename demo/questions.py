"""Questions about new scenes of the toy world, to train on: their scenes have only combinations that training has.

    python demo/questions.py [N]      # N = 2000 scenes -> runs/toy/questions_more.jsonl; images in runs/toy/images
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import one_line_errors, stop
from demo import toy
from run.arguments import positional

OUT = Path("runs/toy")


def write_questions(out, n, seed=0):
    """-> number of questions"""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = toy.question_rows(toy.draw_scenes(out, "more", n, seed))
    (out / "questions_more.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return len(rows)


def main(argv):
    if len(argv) > 1 or not all(a.isdigit() and int(a) for a in argv):
        stop("usage: python demo/questions.py [number of scenes]")
    print(f"wrote {write_questions(OUT, int([*argv, 2000][0]))} questions to {OUT / 'questions_more.jsonl'}")


if __name__ == "__main__":
    with one_line_errors():
        main(positional(sys.argv[1:], __doc__))

"""Variants of the toy world, each for one question of demo/systems.py.

    python -m demo.variants [OUT]        # reads and extends the folder OUT, by default runs/toy

    large/          the same scenes and questions; images have twice the side, and signs keep their 15 x 19 pixels. A
                    tower that sees the image at 72 pixels cannot read them; a tower that sees tiles can
    sft_images.json       the conversations without the samples that have no image
    text_questions.jsonl  the held-out questions, with the text of the scene in place of the image
"""

import json
import random
import sys
from pathlib import Path

from config import one_line_errors, stop
from demo import toy
from run.arguments import positional

SPLITS = ("align", "sft", "test")


def draw_large(scene, seed):
    """As toy.draw_scene -> PIL image, 2 SIDE x 2 SIDE. A sign in the middle row or column moves away from the middle
    line, where tiles are cut."""
    from PIL import Image, ImageDraw
    ups, side, cell = 3, 2 * toy.SIDE, 2 * toy.CELL
    image = toy.draw_scene({**scene, "sign": None}, seed).resize((side * ups, side * ups), Image.BICUBIC)
    if sign := scene["sign"]:
        x, y = (cell * (k + 0.5) - (12 if k == 1 else 0) for k in (sign["column"], sign["row"]))
        toy.draw_sign(ImageDraw.Draw(image), x, y, sign["digit"], ups)
    return image.resize((side, side), Image.BOX)


def scenes(split, n, seed=0):
    """Yield the scenes that toy.draw_scenes drew: (file name, scene, random generator in the state before drawing)"""
    for i in range(n):
        rng = random.Random(f"{seed}/{split}/{i}")
        scene = toy.make_scene(rng, test=True) if split == "test" else toy.make_scene(rng, signs=0.8)
        yield f"{split}_{i:05d}.png", scene, rng


def write_variants(out):
    """out: folder that toy.write_world wrote"""
    images = out / "large"
    images.mkdir(exist_ok=True)
    questions = []
    for split in SPLITS:
        for name, scene, rng in scenes(split, toy.SCENES[split]):
            if not (images / name).exists():
                draw_large(scene, rng.getrandbits(32)).save(images / name, compress_level=1)
            if split == "test":
                rng = random.Random(name)
                questions += [{"question_id": f"{name}_{kind}", "type": kind, "answer": answer,
                               "text": f"{toy.scene_text(scene, rng)}\n{question}\n{toy.SHORT}"}
                              for kind, question, answer, _ in toy.scene_questions(scene, rng)]
    (out / "text_questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    rows = json.loads((out / "sft.json").read_text())
    (out / "sft_images.json").write_text(json.dumps([r for r in rows if "image" in r]))


def main(argv):
    out = Path(argv[0] if argv else "runs/toy")
    if len(argv) > 1 or not (out / "sft.json").is_file():
        stop(f"usage: python -m demo.variants [OUT]; {out} holds no toy world (python demo/toy.py {out} draws it)")
    write_variants(out)


if __name__ == "__main__":
    with one_line_errors():
        main(positional(sys.argv[1:], __doc__))

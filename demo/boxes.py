"""Boxes in the toy world: conversations that train a model to say where a thing is, and questions that test it. The
boxes are true: they follow from the centre and radius with which toy.py drew each object.

    python demo/boxes.py [runs/toy]     # reads the folder of the toy world; writes boxes_sft.json and boxes.jsonl there

    python train_sft.py --init=runs/qwen_vl_sft --data=runs/toy/sft.json:0.5,runs/toy/boxes_sft.json:0.5 \\
        --images=runs/toy/images --out=runs/boxes
    python eval.py --model=runs/boxes --task=refcoco --data=runs/toy/boxes.jsonl --images=runs/toy/images

A box is text in Qwen-VL's form, <box>(x1,y1),(x2,y2)</box>, with numbers from 0 to 999. A question names a thing by
colour and shape, which no two things of a scene share. Test scenes have held-out combinations (toy.py)."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import one_line_errors, stop
from demo import toy
from demo.variants import scenes
from metrics.boxes import qwen_box
from run.arguments import positional

# how far a shape reaches from its centre to the left, top, right and bottom, in radii: the factors in toy.draw_scene
REACH = {"circle": (1, 1, 1, 1), "ring": (1, 1, 1, 1), "cross": (1, 1, 1, 1), "square": (0.95, 0.95, 0.95, 0.95),
         "triangle": (0.953, 1.1, 0.953, 0.55), "star": (1.046, 1.1, 1.046, 0.89)}
ASK = "Give the box of the {}."


def object_boxes(scene, seed):
    """-> {colour and shape of an object: its box (x1, y1, x2, y2)}, as shares of the image's sides, 0 to 1. seed: as in
    draw_scene"""
    circles = []
    toy.draw_scene(scene, seed, circles)
    drawn = [o for o in toy.things(scene) if "shape" in o]
    sides = {toy.pair_name(o): zip((x, y, x, y), (-r, -r, r, r), REACH[o["shape"]])
             for o, (x, y, r) in zip(drawn, circles)}
    return {name: tuple(min(1, max(0, (c + r * reach) / toy.SIDE)) for c, r, reach in sides[name]) for name in sides}


def write_boxes(out, sizes=toy.SCENES):
    """out: folder that toy.write_world wrote, with `sizes` scenes in each split -> number of rows and of questions"""
    rows, questions = [], []
    for name, scene, rng in scenes("sft", sizes["sft"]):
        found = [*object_boxes(scene, rng.getrandbits(32)).items()]
        rng.shuffle(found)
        turns = toy.dialogue([(ASK.format(thing), qwen_box(box), None) for thing, box in found], True, "<image>\n")
        turns[0]["value"] = turns[0]["value"].removesuffix("\n" + toy.SHORT)
        rows.append({"id": f"box_{name}", "image": name, "conversations": turns})
    for name, scene, rng in scenes("test", sizes["test"]):
        size = {o["color"] + " " + o["shape"]: o["size"] for o in scene["objects"]}
        questions += [{"question_id": f"{name}_{thing}", "image": name, "type": size[thing], "text": ASK.format(thing),
                       "answer": qwen_box(box)} for thing, box in object_boxes(scene, rng.getrandbits(32)).items()]
    (out / "boxes_sft.json").write_text(json.dumps(rows))
    (out / "boxes.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return len(rows), len(questions)


def main(argv):
    out = Path(argv[0] if argv else "runs/toy")
    if len(argv) > 1 or not (out / "sft.json").is_file() or not (out / "questions.jsonl").is_file():
        stop(f"usage: python demo/boxes.py [FOLDER]; {out} holds no toy world (python demo/toy.py {out} draws it)")
    print("wrote {} conversations and {} questions".format(*write_boxes(out)))


if __name__ == "__main__":
    with one_line_errors():
        main(positional(sys.argv[1:], __doc__))

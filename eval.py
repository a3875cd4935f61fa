"""Score a model on a file of questions.

    python eval.py --model=runs/sft                         # the held-out questions of the toy world (generated data)
    python eval.py --model=runs/sft --blind                 # control: the features of every image are set to zero
    python eval.py --model=runs/sft --shuffled              # control: each question gets the image of another question
    python eval.py --model=DIR --task=vqa --data=FILE.jsonl --images=DIR [--answers=FILE]
    torchrun --nproc_per_node=8 eval.py ...                 # the questions are divided between the processes

The file of questions is jsonl or a json list. Each question has `question_id`, `image`, `text` and `answer` (or
`answers`, or POPE's `label`). It may have a `type` (or `category`). The task says how an answer is scored:

    exact           exact match
    vqa             VQA accuracy; the answers are normalised as EvalAI's scorer does it
    vqa_official    VQA accuracy; the answers are normalised as the official script does it
    pope            yes or no

The answers are written as jsonl. tools/report.py makes a page of them with images. The last line of the output has the
scores as JSON.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from statistics import fmean

import torch

import config
import engine
import metrics
from config import BadSample, setting
from formats.rows import read_questions
from formats.whole import write_file
from generate import Chat, with_marker
from images import image_folder, safe_path
from run.folder import unwritable

SCORES = {"exact": metrics.exact, "vqa": metrics.vqa_accuracy,     # each: (answer, true answers) -> score from 0 to 1
          "vqa_official": lambda answer, truth: metrics.vqa_accuracy(answer, truth, evalai=False),
          "pope": lambda answer, truth: float(metrics.pope_answer(answer) == truth[0])}


@dataclasses.dataclass
class Settings:
    model: str = setting("runs/sft", "a run, its model/ or adapter/, any LLaVA folder or adapter")
    task: str = setting("exact", "how an answer is scored", choices=tuple(SCORES))
    data: str = setting("", "jsonl of questions; empty: the toy world's held-out ones")
    images: str = setting("", "folder that image names are relative to; empty: the folder of the data")
    answers: str = setting("", "file to write; empty: answers_HOW.jsonl in the run, or in answers/ if it is read-only")
    blind: bool = setting(False, "image features set to zero: what the text alone gives away")
    shuffled: bool = setting(False, "the image of another question: the fairer control")
    limit: int = setting(0, "questions; 0 = all", 0)
    batch_size: int = setting(64, "questions at a time", 1)
    max_new_tokens: int = setting(32, "tokens of an answer", 1)
    template: str = setting("", "empty: as the model was trained")
    system: str | None = setting(None, "none: as the model was trained")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1")
    dtype: str = setting("auto", "auto, bf16, fp32, fp64")
    kernels: str = setting("auto", "torch, triton; auto = triton on a GPU")


# ---- questions ------------------------------------------------------------------------------------------------------

def toy_questions(world):
    """Generate the toy data's held-out questions if they are missing -> path of their file, folder of their images"""
    from demo import toy
    if world.rank == 0:
        try:
            toy.write_world("runs/toy", "test")
        except OSError as e:
            config.stop(f"the toy world cannot be drawn in runs/toy: {e.strerror or e}")
    world.gather(None)                                           # a barrier: all ranks wait until rank 0 has written
    return "runs/toy/questions.jsonl", "runs/toy/images"


def other_images(rows):
    """Choose, for each question, an image that is not its own -> list of names; None for a question without image"""
    images = sorted({r["image"] for r in rows} - {None})
    if len(images) < 2:
        config.stop("--shuffled needs at least two different images")
    half = len(images) // 2
    other = {name: images[(i + half) % len(images)] for i, name in enumerate(images)}
    return [other.get(r["image"]) for r in rows]


# ---- answers --------------------------------------------------------------------------------------------------------

def ask(chat, rows, names, images, max_new_tokens):
    """Ask the questions `rows` about the images `names` -> list of answers; None for a question that cannot be asked"""
    prompts, pixels, asked = [], [], []
    for i, (row, name) in enumerate(zip(rows, names)):
        try:
            shown, blocks = chat.look([safe_path(images, name)] if name else [])                    # [(tiles, 3, S, S)]
            prompts.append(chat.prompt([(with_marker(row["text"], len(blocks)), None)], blocks))    # ids (N,)
        except BadSample as e:
            print(f"question {row['question_id']}: {e}; counted as wrong", file=sys.stderr)
            continue
        pixels += shown
        asked.append(i)
    answers = dict(zip(asked, chat.answers(prompts, pixels, max_new_tokens)))
    return [answers.get(i) for i in range(len(rows))]


def answers_file(s, name):
    """Choose the path of the file of answers. It is s.answers. If that is empty, it is a file in the run folder, or in
    ./answers/ if the run folder is read-only or missing. Stop if the path cannot be written: this is better before the
    first question than after the last one."""
    run = Path(s.model)
    run = run.parent if run.exists() and run.name in ("model", "adapter") else run
    here = Path("answers", run.resolve().name)
    out = Path(s.answers or (run if run.exists() else here) / f"answers_{name}.jsonl")
    problem = f"{out} is not a file" if out.exists() and not out.is_file() else unwritable(out.parent)
    if problem and not s.answers:
        print(f"{problem}; the answers go to {here}", file=sys.stderr)
        out, problem = here / out.name, unwritable(here)
    if problem:
        config.stop(f"{problem}: --answers=FILE says where the answers may go")
    return out


def main(s):
    config.check_ranges(s)
    if s.blind and s.shuffled:
        config.stop("--blind and --shuffled are two different controls: choose one")
    world = engine.start(s.device, s.dtype)
    data, images = (s.data, s.images or str(Path(s.data).parent)) if s.data else toy_questions(world)
    rows = read_questions(data, s.task if s.data else "exact")
    if s.task == "pope":
        rows = [r for r in rows if r["answers"] in (["yes"], ["no"])]            # keep only yes/no questions
    rows = rows[: s.limit or None]
    image_folder(images)
    how = "blind" if s.blind else "shuffled" if s.shuffled else "seeing"
    names = other_images(rows) if s.shuffled else [r["image"] for r in rows]
    chat = Chat(s.model, s.device, s.dtype, s.template, s.system, s.kernels)
    out = answers_file(s, how if s.task == "exact" else f"{s.task}_{how}") if world.rank == 0 else None
    if s.blind:
        chat.model.vision_tower.register_forward_hook(lambda module, args, features: torch.zeros_like(features))

    began, mine, answered = time.time(), range(world.rank, len(rows), world.size), []
    for i in range(0, len(mine), s.batch_size):
        at = mine[i : i + s.batch_size]
        answered += zip(at, ask(chat, [rows[j] for j in at], [names[j] for j in at], images, s.max_new_tokens))
    answers = [a for _, a in sorted((i, a) for rank in world.gather(answered) for i, a in rank)]
    if answers.count(None) == len(answers):
        config.stop(f"none of the {len(rows)} questions could be asked; the lines above say why")
    points = [0.0 if a is None else SCORES[s.task](a, r["answers"]) for a, r in zip(answers, rows)]

    kinds = {k: [i for i, r in enumerate(rows) if r["type"] == k] for k in sorted({r["type"] for r in rows})}
    result = {"task": s.task, "n": len(rows), "accuracy": fmean(points), "how": how,
              "types": {k: fmean([points[i] for i in at]) for k, at in kinds.items()},
              "counts": {k: len(at) for k, at in kinds.items()}, "unreadable": answers.count(None),
              "model": s.model, "data": data, "template": chat.template, "seconds": round(time.time() - began, 1)}
    if s.task == "pope":
        result |= metrics.pope_by_type(answers, [r["answers"][0] for r in rows], kinds)
    if world.rank > 0:
        return
    lines = [json.dumps({"question_id": r["question_id"], "prompt": r["text"], "text": a, "score": p,
                         "answers": r["answers"], "image": n, "type": r["type"]}) + "\n"
             for r, a, p, n in zip(rows, answers, points, names)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, "".join(lines))
        print(f"{out}; a page of it: python -m tools.report {out} --images={images}", file=sys.stderr)
    except OSError as e:
        config.stop(f"{e.filename or out} could not be written: {e.strerror}")
    finally:
        print(json.dumps(result), flush=True)                     # the score is printed even if the disk is full


if __name__ == "__main__":
    engine.run_script(main, Settings, __doc__)

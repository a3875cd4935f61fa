"""Score a model on a file of questions.

    python eval.py --model=runs/sft                         # the held-out questions of the toy world (generated data)
    python eval.py --model=runs/sft --blind                 # control: the features of every image are set to zero
    python eval.py --model=runs/sft --shuffled              # control: each question gets the image of another question
    python eval.py --model=DIR --task=vqa --data=FILE.jsonl --images=DIR [--answers=FILE]
    torchrun --nproc_per_node=8 eval.py ...                 # the questions are divided between the processes

The file of questions is jsonl or a json list with `question_id`, `image`, `text`, `answer` (or `answers`, or POPE's
`label`) and perhaps a `type` (or `category`); or a file as its benchmark publishes it. The task says how an answer is
scored. All tasks, their files and their rules: docs/evaluation.md. Some of them:

    exact                 exact match
    vqa, vqa_official     VQA accuracy; the answers are normalised as EvalAI's scorer or as the official script does it
    pope, mme             yes or no
    mmmu, mmbench ...     letters of options; mmbench asks each question with its options rotated
    refcoco               boxes: right if intersection over union is at least 0.5

    python eval.py --score=ANSWERS.jsonl --task=T --data=FILE     # score answers that exist, without a model
    python eval.py ... --against=OTHER.jsonl                      # and test them against the answers of another run
    python eval.py ... --shots=4 [--shots_data=FILE]              # each question after four examples with their answers

The answers are written as jsonl. tools/report.py makes a page of them with images. The last line of the output has the
scores as JSON, with 95 % confidence intervals. Questions without true answers are answered, not scored.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

import config
import engine
from config import BadSample, setting
from formats.answers import answered_questions, plain_row, read_answers
from formats.configs import positions
from formats.image_files import image_folder, safe_path
from formats.questions import choose_examples, example_answer, image_bytes, read_questions
from formats.whole import write_file
from generate import Chat, with_marker
from metrics.tasks import TASKS, compare, evaluate
from run.folder import unwritable

TOY_TASKS = ("exact", "vqa", "vqa_official", "pope")          # the toy world has questions for these


@dataclasses.dataclass
class Settings:
    model: str = setting("runs/sft", "a run, its model/ or adapter/, any LLaVA folder or adapter")
    task: str = setting("exact", "how an answer is scored", choices=tuple(TASKS))
    data: str = setting("", "file of questions; empty: the toy world's held-out ones")
    images: str = setting("", "folder that image names are relative to; empty: the folder of the data")
    answers: str = setting("", "file to write; empty: answers_HOW.jsonl in the run, or in answers/ if it is read-only")
    blind: bool = setting(False, "image features set to zero: what the text alone gives away")
    shuffled: bool = setting(False, "the image of another question: the fairer control")
    score: str = setting("", "file of answers: score these, without a model")
    against: str = setting("", "answers of another run to the same questions: test the difference")
    shots: int = setting(0, "examples before each question", 0, 32)
    shots_data: str = setting("", "questions with answers to choose examples from; empty: the data")
    limit: int = setting(0, "questions, or whole groups of them (MMBench, MME); 0 = all", 0)
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


def limited(rows, n):
    """-> the first n questions, 0: all. Questions of one group are scored together, so they count as one here"""
    groups = [row.get("group", i) for i, row in enumerate(rows)]
    kept = {*[*dict.fromkeys(groups)][: n or None]}
    return [row for row, group in zip(rows, groups) if group in kept]


def other_images(rows):
    """Choose, for each question, images that are not its own -> list; None for a question without image"""
    own = [r["image"] if isinstance(r["image"], tuple) else (r["image"],) for r in rows]
    images = {image: None for several in own for image in several if image is not None}     # as a set, but in order
    images = sorted(images, key=lambda image: image if isinstance(image, str) else "")
    if len(images) < 2:
        config.stop("--shuffled needs at least two different images")
    half = len(images) // 2
    other = {image: images[(i + half) % len(images)] for i, image in enumerate(images)}
    return [tuple(map(other.get, several)) if len(several) > 1 else other.get(several[0]) for several in own]


def images_of(data):
    """-> the folder that the image names of a file of questions are relative to, unless --images names another"""
    first = Path(data.partition(",")[0])                         # MME is a folder itself
    return str(first if first.is_dir() else first.parent)


# ---- answers --------------------------------------------------------------------------------------------------------

def image_sources(image, folder):
    """The image of a question (None, a name, bytes, Stored, or several of these) -> list of what Chat.look reads"""
    several = image if isinstance(image, tuple) else () if image is None else (image,)
    return [safe_path(folder, image_bytes(x)) for x in several]


def ask(chat, rows, images, folder, max_new_tokens, examples):
    """Ask the questions `rows` about `images` -> list of answers; None for a question that cannot be asked.
    examples: question -> [(text, answer, sources)]: the turns before the question, each with its own images"""
    prompts, pixels, asked = [], [], []
    for i, (row, image) in enumerate(zip(rows, images)):
        try:
            turns = [*examples(row), (row["text"], None, image_sources(image, folder))]
            shown, blocks = chat.look([source for turn in turns for source in turn[2]])             # [(tiles, 3, S, S)]
            prompt = chat.prompt([(with_marker(t, len(own)), a) for t, a, own in turns], blocks)              # ids (N,)
            if len(prompt) + max_new_tokens > (most := positions(chat.cfg.text)):
                raise BadSample("the prompt and its answer are longer than the model's positions",
                                f"{len(prompt)} + {max_new_tokens} tokens, {most} positions")
            prompts.append(prompt)
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


def score_all(s, rows, answers):
    """-> the score of each answer, dict of all scores; with --against, a test against the answers of another run"""
    points, result = evaluate(s.task, answers, rows)
    if s.against and None not in points:
        others = read_answers(s.against, rows)
        result["against"] = {"answers": s.against} | compare(s.task, answers, others, rows)
    return points, {"task": s.task} | result | {"unreadable": answers.count(None)}


def save_answers(out, rows, answers, points, shown):
    """Write the answers with their scores, or None if they are not scored -> None, or the OSError of a full disk"""
    lines = [json.dumps({"question_id": r["question_id"], "prompt": r["text"], "text": a, "score": p}
                        | plain_row(r | {"image": image})) + "\n"
             for r, a, p, image in zip(rows, answers, points, shown)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, "".join(lines))
    except OSError as e:
        return e


def main(s):
    config.check_ranges(s)
    if s.blind and s.shuffled:
        config.stop("--blind and --shuffled are two different controls: choose one")
    if s.score:
        rows = read_questions(s.data, s.task) if s.data else answered_questions(s.score)
        try:
            result = score_all(s, rows, read_answers(s.score, rows))[1]
        except KeyError as key:                                   # of answers to another task
            config.stop(f"{s.score}: its answers have no {key}, which task={s.task} reads; --data=FILE names the "
                        "questions")
        print(json.dumps(result | {"data": s.data, "score": s.score}))
        return
    if not s.data and s.task not in TOY_TASKS:
        config.stop(f"task={s.task} needs --data=FILE; the toy world has questions for {', '.join(TOY_TASKS)}")
    world = engine.start(s.device, s.dtype)
    data, images = (s.data, s.images or images_of(s.data)) if s.data else toy_questions(world)
    rows = read_questions(data, s.task if s.data else "exact")
    if s.task == "pope" and not s.data:
        rows = [r for r in rows if r["answers"] in (["yes"], ["no"])]            # keep only yes/no questions
    pool, rows = read_questions(s.shots_data, s.task) if s.shots_data else rows, limited(rows, s.limit)
    pool_images = images_of(s.shots_data) if s.shots_data and not s.images else images
    image_folder(images)
    how = "blind" if s.blind else "shuffled" if s.shuffled else "seeing"
    shown = other_images(rows) if s.shuffled else [r["image"] for r in rows]
    if s.against:
        read_answers(s.against, rows)                             # a wrong file stops here, not after the last question
    chat = Chat(s.model, s.device, s.dtype, s.template, s.system, s.kernels)
    name = how if s.task == "exact" else f"{s.task}_{how}"
    out = answers_file(s, name + f"_{s.shots}shots" * bool(s.shots)) if world.rank == 0 else None
    if s.blind:
        chat.model.vision_tower.register_forward_hook(lambda module, args, features: torch.zeros_like(features))

    def examples(row):
        chosen = choose_examples(row, pool, s.shots)
        return [(q["text"], example_answer(q), image_sources(q["image"], pool_images)) for q in chosen]

    began, mine, answered = time.time(), range(world.rank, len(rows), world.size), []
    for i in range(0, len(mine), s.batch_size):
        at = mine[i : i + s.batch_size]
        some = [rows[j] for j in at], [shown[j] for j in at]
        answered += zip(at, ask(chat, *some, images, s.max_new_tokens, examples))
    answers = [a for _, a in sorted((i, a) for rank in world.gather(answered) for i, a in rank)]
    if answers.count(None) == len(answers):
        config.stop(f"none of the {len(rows)} questions could be asked; the lines above say why")
    if world.rank > 0:
        return
    save_answers(out, rows, answers, [None] * len(rows), shown)    # an error while scoring costs no answer
    points, result = score_all(s, rows, answers)
    result |= {"how": how, "model": s.model, "data": data, "template": chat.template, "shots": s.shots,
               "seconds": round(time.time() - began, 1)}
    problem = save_answers(out, rows, answers, points, shown)
    print(json.dumps(result), flush=True)                         # the score is printed even if the disk is full
    if problem:
        config.stop(f"{problem.filename or out} could not be written: {problem.strerror}")
    print(f"{out}; a page of it: python -m tools.report {out} --images={images}", file=sys.stderr)


if __name__ == "__main__":
    engine.run_script(main, Settings, __doc__)

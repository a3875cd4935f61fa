"""Make training data: conversations, descriptions and reasoning from captions and boxes, through a language model.

    python tools/serve.py --model=runs/sft --port=8000                                  # or any other server
    python -m tools.curate synth FILE --images=DIR --out=made.jsonl --url=http://127.0.0.1:8000/v1
    python -m tools.curate synth FILE --images=DIR --out=made.jsonl --url=https://api.openai.com/v1 \\
        --model_name=NAME --key_env=OPENAI_API_KEY --per_minute=60 --workers=4

A row of FILE has one image and `captions` (a list), `caption`, or a first answer; and perhaps `boxes`:

    {"id": 7, "image": "dog.jpg", "captions": ["A sleeping dog."], "boxes": [{"label": "dog", "box": [.1, .2, .6, .9]}]}

A box is left, top, right, bottom, as shares of the sides, or in pixels if the row has width and height. The model reads
these texts alone, never the image: what captions do not say, it cannot know. Each kind makes one row in LLaVA's form,
with the id ID_KIND. Every reply is tested (tools/curate_prompts.py). A reply that fails is asked for again, at most
--retries times, with another seed; then it is listed in --failed with its reason.

The same command goes on where a stopped one was: rows that OUT has are not asked for again. The API key is read from
the environment variable that --key_env names, and appears in no message and no file.
"""

import dataclasses
import itertools
import json
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import config
from chat import IMAGE
from config import BadSample, setting, stop
from formats.image_files import image_folder, safe_path
from formats.rows import conversation
from formats.strict_json import strict_json
from run.arguments import parse
from tools.curate_client import LONGEST, Endpoint, Failed
from tools.curate_prompts import KINDS, prompt, read_reply, row_facts
from tools.curate_rows import check_length, check_written, open_input, row_line

STREAK = 20                # failures one after another that stop the run


@dataclasses.dataclass
class Settings:
    out: str = setting("", "file to write, jsonl in LLaVA's form; rows are added to it")
    failed: str = setting("", "file to write, jsonl: what could not be made, and why; empty: OUT_failed.jsonl")
    images: str = setting(".", "folder that image names are relative to; the images must be there")
    out_images: str = setting("", "folder for images that rows hold as bytes; empty: they become data: URLs")
    kinds: str = setting(",".join(KINDS), "what to make of each row")
    limit: int = setting(0, "rows to use; 0 = all", 0)
    url: str = setting("http://127.0.0.1:8000/v1", "of the server, up to /v1")
    model_name: str = setting("", "as the server calls it; empty: the server's only model")
    key_env: str = setting("", "environment variable that holds the key; empty: no key is sent")
    per_minute: float = setting(0.0, "most requests in a minute; 0 = no limit", 0, 1e6)
    workers: int = setting(1, "requests at a time", 1, 256)
    retries: int = setting(3, "more requests after one that failed", 0, 100)
    timeout: float = setting(120.0, "seconds without a sign of the server", 0.01, 3600)
    max_tokens: int = setting(1024, "tokens of a reply", 1)
    temperature: float = setting(0.7, "of the replies", 0, 2)


def done_ids(file):
    """Read the ids that OUT has -> set. A last line without its end, of a killed run, is cut off."""
    if not file.exists():
        return set()
    blob = file.read_bytes()
    whole, ids = blob[: blob.rfind(b"\n") + 1], set()
    for n, line in enumerate(whole.splitlines(), 1):
        try:
            ids.add(strict_json(line.decode("utf-8"), f"{file}, line {n}")["id"])
        except (ValueError, TypeError, KeyError):
            stop(f"{file}, line {n}: no row that this program wrote; --out=FILE names another file")
    if len(whole) < len(blob):
        os.truncate(file, len(whole))
    return ids


def jobs(rows, s, done, count, fail):
    """Yield what is to be made, in order: (id, kind, image, facts). count: Counter; fail: function of id, BadSample"""
    kinds, seen = s.kinds.split(","), set()
    for i in range(min(len(rows), s.limit or len(rows))):
        number = f"row {i}"
        try:
            row = rows[i]
            number = str(row.get("id", i))
            if number in seen:
                raise BadSample("the id of an earlier row")
            seen.add(number)
            image, facts = row_facts(row)
            safe_path(s.images, image)
        except BadSample as e:
            fail(number, e)
            continue
        for kind in kinds:
            name = f"{number}_{kind}"
            if name in done:
                count["already"] += 1
            else:
                yield name, kind, image, facts


def make(job, endpoint, s, rejected):
    """Ask for one job until a reply is good -> its row in LLaVA's form, or the BadSample of the last try. rejected:
    function of a BadSample, called for each bad try"""
    name, kind, image, facts = job
    for attempt in range(1 + s.retries):
        try:
            text = endpoint.ask(s.model_name, prompt(kind, facts), max_tokens=s.max_tokens, temperature=s.temperature,
                                seed=attempt)
            turns = read_reply(kind, text, name)
            turns[0] = (f"{IMAGE}\n{turns[0][0]}", turns[0][1])
            said = [{"from": who, "value": x} for turn in turns for who, x in zip(("human", "gpt"), turn)]
            row = {"id": name, "image": image, "conversations": said, "kind": kind, "model": s.model_name}
            conversation(row)                                  # as training will read it
            return row
        except BadSample as e:
            rejected(e)
            last, wait = e, getattr(e, "wait", 0.0)
        if not getattr(last, "again", True) or (wait or 0) > LONGEST:
            break
        endpoint.hold(min(60.0, 2.0**attempt) if wait is None else wait)
    return last


def read_key(name):
    if name and not os.environ.get(name, "").strip():
        stop(f"key_env={name}: this environment variable is empty or not set")
    return os.environ[name].strip() if name else ""


def the_model(endpoint):
    """-> the name of the server's only model"""
    try:
        names = endpoint.models()
    except Failed as e:
        stop(f"{endpoint.url} does not say which model it has: {e}")
    return names[0] if len(names) == 1 else stop("--model_name= one of " + (", ".join(names[:20]) or "(none)"))


def main(argv):
    s = parse(Settings, [a for a in argv if a.startswith("--")], __doc__)
    config.check_ranges(s)
    image_folder(s.images)
    if wrong := [k for k in s.kinds.split(",") if k not in KINDS]:
        stop(f"kinds={s.kinds}: {wrong[0]!r} is none of {', '.join(KINDS)}")
    if len({*s.kinds.split(",")}) < s.kinds.count(",") + 1:
        stop(f"kinds={s.kinds}: each kind once, since it is a part of the id")
    rows, endpoint = open_input(argv, s), Endpoint(s.url, read_key(s.key_env), s.per_minute, s.timeout)
    out = Path(s.out)
    listed = Path(s.failed or f"{out.with_suffix('')}_failed.jsonl")
    check_written(rows, out=out, failed=listed)
    count, rejected, failures, lock, began = Counter(), Counter(), Counter(), threading.Lock(), time.monotonic()
    try:
        for folder in {out.parent, listed.parent, *([Path(s.out_images)] if s.out_images else [])}:
            folder.mkdir(parents=True, exist_ok=True)
        done = done_ids(out)
        s.model_name = s.model_name or the_model(endpoint)
        with open(out, "a", encoding="utf-8") as made, open(listed, "w", encoding="utf-8") as bad:
            def fail(name, e):
                failures[e.reason] += 1
                bad.write(row_line({"id": name, "reason": e.reason, "detail": str(e)[len(e.reason) + 2 :]}))
                bad.flush()

            def reject(e):
                with lock:
                    rejected[e.reason] += 1

            def work(job):
                return job[0], make(job, endpoint, s, reject)

            pool = ThreadPoolExecutor(s.workers) if s.workers > 1 else None
            todo, streak = jobs(rows, s, done, count, fail), 0
            while some := [*itertools.islice(todo, s.workers)]:
                for name, row in pool.map(work, some) if pool else map(work, some):
                    if isinstance(row, BadSample):
                        fail(name, row)
                        streak += 1
                    else:
                        made.write(check_length(row_line(row, s.out_images), name))
                        made.flush()                           # a killed run leaves at most a part of a line
                        count["made"], streak = count["made"] + 1, 0
                    if streak >= STREAK:
                        stop(f"{STREAK} failures one after another, the last: {row}; {count['made']} rows are in {out}")
                print(f"\r{count['made']:,} rows, {failures.total():,} failures, {endpoint.requests:,} requests, "
                      f"{time.monotonic() - began:.0f} s", end="", file=sys.stderr)
            print(file=sys.stderr)
    except OSError as e:
        stop(f"{e.filename or out} could not be written: {e.strerror}")
    print(json.dumps({"out": str(out), "made": count["made"], "already": count["already"],
                      "requests": endpoint.requests, "rejected": dict(rejected.most_common()),
                      "failed": dict(failures.most_common()),
                      "list": str(listed)}))

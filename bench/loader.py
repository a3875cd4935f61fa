"""What a step of data costs one rank, and what it costs to open large files. Nothing is trained.

    python -m bench loader                          # all rows
    python -m bench loader --against=OTHER_CHECKOUT # the steps beside those of another revision, in turns
    python -m bench loader --peer=runs/sft/model    # steps of batch 16 beside the processor of transformers, in turns

Rows of data have text lengths of LLaVA's mixture (bench/__init__.py), and images of 640 x 480 pixels (JPEG). A step is
steps[s] on rank 0 of 1, 8 and 64 simulated ranks: rows read, tokenised, images decoded and resized to 336, packed.
CPU time, one thread. Uneven: tokens of the busiest rank (language model and tower) divided by the mean of all ranks.

Large files: `--large` rows of 250 bytes in jsonl, tar (text alone) and parquet. First: no index exists; again: it does.
Digest: what a resumed run compares. MiB: growth of the process, with the mapped pages of the file and without them.

Peer: transformers' LlavaProcessor with Pillow, on the same JPEG images and texts; DIR gives tokenizer and template. Ids
and pixels are compared bit for bit. Plain: the peer without rescaling and normalising, which here the model does.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

SIDE, TOKENS, IMAGE, MAX_LEN, MAX_TOKENS = 336, 576, 3, 2048, 8192
BATCHES, WORLDS = (16, 128, 1024), (1, 8, 64)
GROUP = 1000               # rows of a row group of parquet
BODIES = 5000              # rows of different texts; a longer file repeats them


def write_rows(folder, n):
    """Write n rows of LLaVA's mixture and ten images"""
    import numpy as np
    import torch
    from PIL import Image

    from bench import draw_lengths
    words = [w for w in Path(__file__).resolve().parents[1].joinpath("README.md").read_text().split() if w.isalpha()]
    rng = np.random.default_rng(0)
    for k in range(10):
        small = Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8))
        small.resize((640, 480), Image.BICUBIC).save(folder / f"{k}.jpg", quality=90)
    bodies = []
    for i, (tokens, _, images) in enumerate(draw_lengths(min(n, BODIES), torch.Generator().manual_seed(0))):
        text = " ".join(rng.choice(words, tokens // 2))
        asked, said = text[: len(text) // 2].strip(), text[len(text) // 2 :].strip()
        turns = [("human", "<image>\n" * images + asked), ("gpt", said)]
        row = {"conversations": [{"from": who, "value": what} for who, what in turns]}
        bodies.append(json.dumps(row | ({"image": f"{i % 10}.jpg"} if images else {}))[1:] + "\n")
    with open(folder / "rows.jsonl", "w") as f:
        f.writelines(f'{{"id": {i}, {bodies[i % len(bodies)]}' for i in range(n))


def steps_of(folder, tok, batch, rank=0, world=1):
    from data import Encoder, Steps
    from formats.tokenizer import Tokenizer
    from images import ImageSpec, Layout
    encode = Encoder(Tokenizer(tok), "vicuna_v1", Layout(IMAGE, TOKENS), MAX_LEN, "")
    return Steps(str(folder / "rows.jsonl"), str(folder), encode, ImageSpec(SIDE), batch, MAX_TOKENS, 0, rank, world)


def step_times(folder, tok):
    """-> {"batch, ranks": CPU milliseconds of a step of rank 0}"""
    import torch
    torch.set_num_threads(1)
    out = {}
    for batch in BATCHES:
        for world in WORLDS:
            if world > batch:
                continue
            steps, times = steps_of(folder, tok, batch, 0, world), []
            steps.samples(0)                                   # draws the order of the epoch
            for s in range(1, 3 if batch * 4 >= world * 128 else 6):
                began = time.process_time()
                assert not steps[s].dropped
                times.append(1000 * (time.process_time() - began))
            out[f"{batch}, {world}"] = statistics.median(times)
    return out


def uneven(folder, tok, batch, world, steps=8):
    """-> tokens of the busiest rank / mean of all ranks, by the estimate and by exact costs; a mean over steps"""
    from data import share_out
    whole, out = steps_of(folder, tok, batch, 0, world), []
    for s in range(steps):
        drawn = whole.samples(s)
        ids = [whole.encode(whole.files[f][i], whole.images)[0] for f, i in drawn]
        true = [len(x) + x.count(IMAGE) for x in ids]
        for costs in ([whole.cost(*at) for at in drawn], true):
            loads = [sum(true[i] for i in group) for group in share_out(costs, world)]
            out.append(max(loads) * world / sum(loads))
    return statistics.mean(out[::2]), statistics.mean(out[1::2])


# ---- large files ----------------------------------------------------------------------------------------------------

def numbered(template, first, n):
    """n copies of the bytes `template`, in which each "123456789" is the number of the row -> (n, length) uint8"""
    import numpy as np
    out = np.tile(np.frombuffer(template, np.uint8), (n, 1))
    digits = (np.arange(first, first + n)[:, None] // 10 ** np.arange(8, -1, -1) % 10 + ord("0")).astype(np.uint8)
    at = template.find(b"123456789")
    while at >= 0:
        out[:, at : at + 9] = digits
        at = template.find(b"123456789", at + 1)
    return out


def write_large(folder, n, kind):
    """Write n rows of one kind -> the file, None without pyarrow"""
    turns = [("human", "Question 123456789? " * 4), ("gpt", "Answer 123456789. " * 4)]
    row = {"id": "123456789", "conversations": [{"from": who, "value": what} for who, what in turns]}
    line, file = json.dumps(row).encode(), folder / f"large.{kind}"
    if kind == "parquet":
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            return

        def texts(template, k, lengths):                       # k templates -> k strings for each of these lengths
            ends = pa.array([0, *itertools.accumulate(lengths * k)], pa.int32())
            return pa.Array.from_buffers(pa.string(), len(ends) - 1, [None, ends.buffers()[1], pa.py_buffer(template)])
        with pq.ParquetWriter(file, pa.Table.from_pylist([row]).schema) as writer:
            for at in range(0, n, GROUP):
                k = min(n - at, GROUP)
                both = numbered("".join(x for _, x in turns).encode(), at, k)
                said = texts(both.tobytes(), k, [len(x) for _, x in turns])
                who = texts(b"humangpt" * k, k, [5, 3])
                both = pa.ListArray.from_arrays(pa.array(range(0, 2 * k + 1, 2), pa.int32()),
                                                pa.StructArray.from_arrays([who, said], ["from", "value"]))
                names = texts(numbered(b"123456789", at, k).tobytes(), k, [9])
                writer.write_table(pa.Table.from_arrays([names, both], ["id", "conversations"]).cast(writer.schema))
        return file
    info = tarfile.TarInfo("123456789.json")
    info.size = len(line)
    head = info.tobuf()
    whole = head + line + bytes(-len(line) % 512) if kind == "tar" else line + b"\n"
    with open(file, "wb") as f:
        for at in range(0, n, GROUP):
            rows = numbered(whole, at, min(n - at, GROUP))
            if kind == "tar":                                  # the checksum of the header: six octal digits
                sums = rows[:, :512].sum(1, dtype=int) - rows[:, 148:156].sum(1, dtype=int) + 8 * 32
                rows[:, 148:154] = sums[:, None] >> [15, 12, 9, 6, 3, 0] & 7 | ord("0")
            f.write(rows.tobytes())
        f.write(bytes(1024 * (kind == "tar")))
    return file


def open_large(file):
    """In a process of its own -> seconds to open, to digest, to draw an epoch, to read 100 rows at random; CPU seconds
    to open; growth, growth without mapped pages in MiB at the end"""
    import numpy as np

    from formats.rows import open_rows
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [time.perf_counter()]
    cpu, own = time.process_time(), anonymous()
    rows = open_rows(file)
    times.append(time.perf_counter())
    cpu = time.process_time() - cpu
    rows.digest(hashlib.sha256())
    times.append(time.perf_counter())
    order = np.random.default_rng(0).permutation(len(rows))
    times.append(time.perf_counter())
    for i in order[:100]:
        assert rows[i]["conversations"][1]["value"]
    times.append(time.perf_counter())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return [b - a for a, b in zip(times, times[1:])] + [cpu, grown, anonymous() - own]


def anonymous():
    """-> MiB of this process that are no pages of a file"""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024


# ---- the processor of transformers ----------------------------------------------------------------------------------

def peer_ratios(folder, model, steps=12, batch=16):
    """-> for each step [CPU seconds here, of the peer, of the plain peer]. Stops if ids or pixels differ"""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, LlavaImageProcessorPil, LlavaProcessor
    torch.set_num_threads(1)
    ours = steps_of(folder, model, batch)
    size = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_pad=True)
    peers = [LlavaProcessor(LlavaImageProcessorPil(**size, **how), AutoTokenizer.from_pretrained(model), patch_size=14,
                            vision_feature_select_strategy="default", num_additional_image_tokens=1,
                            chat_template=(model / "chat_template.jinja").read_text())
             for how in ({}, dict(do_rescale=False, do_normalize=False))]

    def theirs(peer, step):
        texts, images = [], []
        for f, i in ours.samples(step):
            row = ours.files[f][i]
            messages = []
            for turn in row["conversations"]:
                text = turn["value"].removeprefix("<image>\n")
                parts = [{"type": "image"}] * (text != turn["value"]) + [{"type": "text", "text": text}]
                messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": parts})
            texts.append(peer.apply_chat_template(messages, tokenize=False))
            images += [Image.open(folder / row["image"])] if "image" in row else []
        return peer(images=images or None, text=texts, padding=True, return_tensors="pt")

    def timed(call, *args):
        began = time.process_time()
        out = call(*args)
        return out, time.process_time() - began

    out = []
    for step in range(steps):
        (mine, a), (_, b), (plain, c) = timed(ours.__getitem__, step), timed(theirs, peers[0], step), timed(
            theirs, peers[1], step)
        out.append([a, b, c])
        samples = {}                                           # ids of a sample -> its image
        for b in mine.micro:
            starts, images = [*(b.pos == 0).nonzero().flatten().tolist(), len(b.ids)], iter(b.images)
            samples |= {tuple(ids): next(images) if IMAGE in ids else None
                        for ids in (b.ids[x:y].tolist() for x, y in zip(starts, starts[1:]))}
        images = iter(plain.get("pixel_values", ()))
        for ids, real in zip(plain["input_ids"], plain["attention_mask"]):
            ids = tuple(ids[real.bool()].tolist())[:MAX_LEN]
            image = next(images) if IMAGE in ids else None
            assert ids in samples, "ids differ"
            assert image is None or np.array_equal(image.numpy(), samples[ids].numpy()), "pixels differ"
        assert not mine.dropped and len(mine.names) == batch
    return out


# ---- the command ----------------------------------------------------------------------------------------------------

def in_process(root, what, *args):
    """Call a function of this file in a new process, with the code of the checkout `root` -> what it returns"""
    code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    text = subprocess.run([sys.executable, "-c", code, __file__, what, *map(str, args)], capture_output=True, text=True,
                          cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if text.returncode:
        raise RuntimeError(text.stderr[-2000:])
    return json.loads(text.stdout.splitlines()[-1])


def main(s, _):
    root = Path(__file__).resolve().parents[1]
    tok, lines, result = root / "demo/llm", [], {"date": s.date, "machine": platform.machine()}
    with tempfile.TemporaryDirectory(dir=s.folder or None) as folder:
        folder = Path(folder)
        write_rows(folder, s.rows)
        sides = [root, Path(s.against)] if s.against else [root]
        rounds = [[in_process(side, "step_times", folder, tok) for side in sides] for _ in range(s.repeats)] or [[{}]]
        lines += ["| batch | ranks | ms, here | ms, there | times faster | uneven | uneven, exact costs |",
                  "|--:|--:|--:|--:|--:|--:|--:|"]
        for cell in rounds[0][0]:
            batch, world = map(int, cell.split(", "))
            here = statistics.median(r[0][cell] for r in rounds)
            there = statistics.median(r[1][cell] for r in rounds) if s.against else None
            ratios = sorted(r[1][cell] / r[0][cell] for r in rounds) if s.against else []
            a, b = uneven(folder, tok, batch, world, max(1, min(8, 1024 // batch)))
            result[cell] = [here, there, ratios, a, b]
            lines.append(f"| {batch} | {world} | {here:,.0f} | " + (f"{there:,.0f} | {statistics.median(ratios):.2f} "
                         f"({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else "|") + f" | {a:.2f} | {b:.2f} |")
            print(lines[-1], flush=True)
        if s.peer:
            seconds = in_process(root, "peer_ratios", folder, Path(s.peer).resolve())[1:]      # the first one warms up
            lines += ["", "| samples per second here / there | median | least | most |", "|---|--:|--:|--:|"]
            for k, name in ((1, "transformers"), (2, "plain")):
                ratios = sorted(step[k] / step[0] for step in seconds)
                result[name] = [statistics.median(ratios), ratios[0], ratios[-1]]
                lines.append(f"| {name} | " + " | ".join(f"{x:.2f}" for x in result[name]) + " |")
                print(lines[-1], flush=True)
        if s.large:
            lines += ["", "| file | MB | | open, s | CPU s | digest, s | order, s | row, ms | MiB | of its own |",
                      "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|"]
            for kind in s.kinds.split(","):
                file = write_large(folder, s.large, kind)
                for when in ("first", "again") if file else ():
                    opened, digest, order, read, cpu, *grown = in_process(root, "open_large", file)
                    lines.append(f"| {kind} | {file.stat().st_size / 1e6:,.0f} | {when} | {opened:.2f} | {cpu:.2f} | "
                                 f"{digest:.2f} | {order:.2f} | {10 * read:.2f} | {grown[0]:,.0f} | {grown[1]:,.0f} |")
                    print(lines[-1], flush=True)
                    result[f"{kind}, {when}"] = [opened, cpu, digest, order, read, *grown]
                if file:
                    file.unlink()
    if s.out:
        Path(s.out).write_text("\n".join(lines) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    what, *args = sys.argv[1:]
    print(json.dumps(globals()[what](*map(Path, args))))       # step_times, open_large, peer_ratios
else:
    from config import setting

    @dataclasses.dataclass
    class Settings:
        rows: int = setting(5000, "rows of the file from which the steps are drawn", 1000)
        repeats: int = setting(3, "processes for each side; the table has their medians", 0)
        against: str = setting("", "folder of another checkout; empty: only this one is measured")
        peer: str = setting("", "model/ of a run, for transformers' processor; empty: no such table")
        large: int = setting(1_000_000, "rows of the large files; 0: none", 0)
        kinds: str = setting("jsonl,tar,parquet", "of the large files")
        folder: str = setting("", "where the files are written; empty: the system's folder for them")
        date: str = setting("", "of the result; empty: today")
        out: str = setting("", "file for the tables")

"""What a step of data costs one rank, and what it costs to open large files. Nothing is trained.

    python -m bench loader                          # all rows
    python -m bench loader --against=OTHER_CHECKOUT # the steps beside those of another revision, in turns

Rows of data have text lengths of LLaVA's mixture (bench/__init__.py), and images of 640 x 480 pixels (JPEG). A step is
steps[s] on rank 0 of 1, 8 and 64 simulated ranks: rows read, tokenised, images decoded and resized to 336, packed.
CPU time, one thread. Uneven: tokens of the busiest rank (language model and tower) divided by the mean of all ranks.

Large files: `--large` rows of 250 bytes in jsonl, tar (text alone) and parquet. First: no index exists; again: it does.
Digest: what a resumed run compares. MiB: growth of the process.
"""

import dataclasses
import hashlib
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
BATCHES, WORLDS = (16, 128, 512), (1, 8, 64)


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
    with open(folder / "rows.jsonl", "w") as f:
        for i, (tokens, _, images) in enumerate(draw_lengths(n, torch.Generator().manual_seed(0))):
            text = " ".join(rng.choice(words, tokens // 2))
            turns = [("human", "<image>\n" * images + text[: len(text) // 2]), ("gpt", text[len(text) // 2 :])]
            row = {"id": i, "conversations": [{"from": who, "value": what} for who, what in turns]}
            f.write(json.dumps(row | ({"image": f"{i % 10}.jpg"} if images else {})) + "\n")


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
            for s in range(1, 3 if batch * 4 > world * 128 else 6):
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

def write_large(folder, n):
    """Write n rows in each kind of file -> the files"""
    def row(i):
        turns = [("human", f"Question {i:9}? " * 4), ("gpt", f"Answer {i:9}. " * 4)]
        return {"id": i, "conversations": [{"from": who, "value": what} for who, what in turns]}
    files = [folder / f"large.{kind}" for kind in ("jsonl", "tar", "parquet")]
    with open(files[0], "w") as f:
        f.writelines(json.dumps(row(i)) + "\n" for i in range(n))
    with open(files[1], "wb") as f:
        for i in range(n):
            info, blob = tarfile.TarInfo(f"{i:09}.json"), json.dumps(row(i)).encode()
            info.size = len(blob)
            f.write(info.tobuf() + blob + bytes(-len(blob) % 512))
        f.write(bytes(1024))
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return files[:2]
    with pq.ParquetWriter(files[2], pa.Table.from_pylist([row(0)]).schema) as writer:
        for at in range(0, n, 1000):
            writer.write_table(pa.Table.from_pylist([row(i) for i in range(at, min(n, at + 1000))]))
    return files


def open_large(file):
    """In a process of its own -> seconds to open, to digest, to draw an epoch, to read 100 rows at random; growth"""
    import numpy as np

    from formats.rows import open_rows
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [time.perf_counter()]
    rows = open_rows(file)
    times.append(time.perf_counter())
    rows.digest(hashlib.sha256())
    times.append(time.perf_counter())
    order = np.random.default_rng(0).permutation(len(rows))
    times.append(time.perf_counter())
    for i in order[:100]:
        assert rows[i]["conversations"][1]["value"]
    times.append(time.perf_counter())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return [b - a for a, b in zip(times, times[1:])] + [grown]


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
            a, b = uneven(folder, tok, batch, world)
            result[cell] = [here, there, ratios, a, b]
            lines.append(f"| {batch} | {world} | {here:,.0f} | " + (f"{there:,.0f} | {statistics.median(ratios):.2f} "
                         f"({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else "|") + f" | {a:.2f} | {b:.2f} |")
            print(lines[-1], flush=True)
        if s.large:
            lines += ["", "| file | MB | | open, s | digest, s | order, s | row, ms | MiB |",
                      "|---|--:|---|--:|--:|--:|--:|--:|"]
            for file in write_large(folder, s.large):
                for when in ("first", "again"):
                    opened, digest, order, read, grown = in_process(root, "open_large", file)
                    lines.append(f"| {file.suffix[1:]} | {file.stat().st_size / 1e6:,.0f} | {when} | {opened:.2f} | "
                                 f"{digest:.2f} | {order:.2f} | {10 * read:.2f} | {grown:,.0f} |")
                    print(lines[-1], flush=True)
                    result[f"{file.suffix[1:]}, {when}"] = [opened, digest, order, read, grown]
                file.unlink()
    if s.out:
        Path(s.out).write_text("\n".join(lines) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    what, *args = sys.argv[1:]
    print(json.dumps({"step_times": step_times, "open_large": open_large}[what](*map(Path, args))))
else:
    from config import setting

    @dataclasses.dataclass
    class Settings:
        rows: int = setting(5000, "rows of the file from which the steps are drawn", 1000)
        repeats: int = setting(3, "processes for each side; the table has their medians", 0)
        against: str = setting("", "folder of another checkout; empty: only this one is measured")
        large: int = setting(1_000_000, "rows of the large files; 0: none", 0)
        folder: str = setting("", "where the files are written; empty: the system's folder for them")
        date: str = setting("", "of the result; empty: today")
        out: str = setting("", "file for the tables")

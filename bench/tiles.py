"""Time attention with other tiles than those of kernels/attention.py: the sweep that fills ATTENTION_TILES.

For each row, one kernel at a time gets each tile of CANDIDATES, the other two keep theirs. A tile is queries, keys,
warps, pipeline stages. Times are of forward, or of the whole backward pass. A tile that does not compile, does not fit
into shared memory or changes the result is listed with the reason. Processes compile all tiles first, in parallel: a
kernel takes one core several seconds.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import time

import torch

import bench
import config
import kernels.attention as module
from bench.kernels import reason, relative_errors
from bench.rows import ROWS, shrink
from config import setting

# (kernel, padded head dim) -> tiles. The review of 2026-11-21 names them; the first one is the table's on Hopper
CANDIDATES = {
    ("forward", 128): [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
    ("forward", 64): [(128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3)],
    ("backward_q", 128): [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3)],
    ("backward_q", 64): [(128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
    ("backward_kv", 128): [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2)],
    ("backward_kv", 64): [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2)],
}
LARGEST_ERROR = 1e-2        # of a result against that of the table's tile: other tiles add in another order


@dataclasses.dataclass
class Settings:
    rows: str = setting("A3,A4,A1,A7", "rows of bench/rows.py")
    size: str = setting("full", "tiny: toy sizes, to see that everything runs", choices=("full", "tiny"))
    device: str = setting("auto", "auto, cpu, cuda")
    ms: float = setting(60.0, "milliseconds of calls in each measurement")
    processes: int = setting(12, "that compile; 0 = none", 0)
    seconds: float = setting(3600.0, "no measurement begins later")
    out: str = setting("", "file for the page, which grows by each line")
    date: str = setting("", "of the page; empty = today")


def contender(name, size, device):
    """-> our contender of the row, with its random inputs; its padded head dim"""
    torch.manual_seed(0)
    make, *sizes = ROWS[name] if size == "full" else shrink(*ROWS[name])
    return make(*sizes, device, bench.LOW[device]).contenders["ours"](), 1 << (ROWS[name][4] - 1).bit_length()


def use_tile(kernel, D, tile, device):
    """Put the tile into the table of this GPU -> the tile that was there"""
    table = module.ATTENTION_TILES[module.architecture(torch.empty(0, device=device)), D]
    before, table[kernel] = table[kernel], tile
    return before


def try_tile(name, size, device, kernel, D, tile):
    """In another process: compile and run once -> None, or the reason why that fails. The tile goes back: else a tile
    that fails would make the next ones of this process fail, too."""
    before = use_tile(kernel, D, tile, device)
    try:
        contender(name, size, device)[0].run()
        bench.sync(device)
    except Exception as e:
        return reason(e)
    finally:
        use_tile(kernel, D, before, device)


def main(s, args):
    s.device = bench.pick_device(s.device)
    names = bench.pick_rows(s.rows, [*ROWS], [n for n in ROWS if n.startswith("A")])
    config.check_ranges(s)
    if s.device == "cpu" and s.size == "full":
        config.stop("rows of full size need a GPU; --size=tiny runs on a CPU")
    end, say, found = time.time() + s.seconds, bench.open_page(s.out), []
    say(f"# Tiles of attention, {s.date}\n\n`python -m bench tiles{''.join(f' {a}' for a in args)}` on "
        f"{bench.describe_machine(s.device)}.\n\n| row | kernel | tile | ms | of the first |\n{'| --- ' * 5}|")
    jobs = [(name, s.size, s.device, kernel, D, tile) for name in names for (kernel, D), tiles in CANDIDATES.items()
            if D == max(64, 1 << (ROWS[name][4] - 1).bit_length()) for tile in tiles]
    failed = {}
    if s.processes:
        pool = concurrent.futures.ProcessPoolExecutor(s.processes, multiprocessing.get_context("spawn"))
        began = {pool.submit(try_tile, *job): job for job in jobs}
        done, late = concurrent.futures.wait(began, timeout=s.seconds / 2)
        failed = {began[f]: reason(f.exception()) if f.exception() else f.result() for f in done}
        failed |= dict.fromkeys((began[f] for f in late), "not compiled in time")
        pool.shutdown(wait=False, cancel_futures=True)
        for p in multiprocessing.active_children():                    # a late one would hold up the end
            p.kill()
    firsts, true = {}, {}
    for name, c, D in ((name, *contender(name, s.size, s.device)) for name in names):
        for job in (job for job in jobs if job[0] == name):
            kernel, tile = job[3], job[5]
            why = failed.get(job) or (f"not begun within {s.seconds:.0f} s" if time.time() > end else None)
            before = use_tile(kernel, job[4], tile, s.device)
            try:
                if not why:
                    got = [t.float() for t in c.run()]
                    error = max(relative_errors(got, true.setdefault(name, got)))
                    why = None if error <= LARGEST_ERROR else f"another result: {error:.1e}"
                    out = c.forward()
                    ms = bench.timed(c.forward if kernel == "forward" else lambda: torch.autograd.grad(
                        out, c.leaves, c.ups, retain_graph=True), s.device, s.ms)
            except Exception as e:
                why = reason(e)
            use_tile(kernel, job[4], before, s.device)
            first = firsts.setdefault((name, kernel), None if why else ms)
            found.append({"row": name, "kernel": kernel, "tile": tile, "ms": None if why else ms, "failed": why})
            share = f"{ms / first:.2f}" if first and not why else ""
            cells = (f"did not run: {why.replace('|', '/')}" if why else f"{ms:.3f}", share)
            say(f"| {name} | {kernel} | {', '.join(map(str, tile))} | {' | '.join(cells)} |")
    bench.print_json({"rows": found})

"""Compare each kernel with its alternatives, in one process, on the same values. A row is one case (bench/rows.py). A
contender is our kernel or an alternative.

Each contender is built. It runs once to measure its error against the definition in float64, and then to measure its
memory. Then all contenders are timed in turns. A contender that cannot run is listed with the reason. Rows run in a
child process, the most important row first. If this process dies, a new one continues with the next row.
"""

import dataclasses
import faulthandler
import math
import statistics
import time
from pathlib import Path

import torch
import torch._functorch.config

import bench
import config
from bench.rows import ROWS, shrink
from config import setting

COLUMNS = ["row", "who", "ms", "of the ceiling", "ratio", "error", "MiB"]


def relative_errors(tensors, truth):
    """Return |t - truth| / |truth| of each tensor t, where |x| is the square root of the sum of squares."""
    return [((t.double() - s).norm() / s.norm().clamp(min=1e-300)).item() for t, s in zip(tensors, truth, strict=True)]


def poison(device):
    """Fill memory with nan and free it. The next results are allocated there, so an element that a kernel forgets to
    write stays nan and shows as an error."""
    torch.full((1 << (30 if device == "cuda" else 16),), math.nan, device=device)


def peak_mib(c):
    """Return the MiB that one run of contender c allocates at most, its results included."""
    c.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    c.run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def times(c, together, device, ms):
    """Time contender c -> [ms of forward, ms of backward], or [ms of forward + backward] if `together` is True."""
    if together:
        return [bench.timed(c.run, device, ms)]
    out = c.forward()
    return [bench.timed(c.forward, device, ms),
            bench.timed(lambda: torch.autograd.grad(out, c.leaves, c.ups, retain_graph=True), device, ms)]


def measure(name, row, device, ms, rounds):
    """Measure a row -> dict with the error, memory and time of each contender, and the reason for each that failed"""
    failed, found, built = {}, {}, {}

    def attempt(who, f, *args):
        """Return f(*args). If f fails, return None and write the reason to failed[who]. If the device is lost, this
        process ends."""
        try:
            return f(*args)
        except Exception as e:
            failed[who] = reason(e)
            built.pop(who, None)
        try:
            bench.sync(device)
            torch.cuda.empty_cache()
        except Exception as e:
            raise SystemExit(f"the device is lost: {reason(e)}") from None

    truth = attempt("truth", row.truth)                          # if it fails (small GPU), errors are not measured
    plain = attempt("truth", lambda: relative_errors(row.plain(), truth)) if row.plain and truth else None

    def first(who):
        c = row.contenders[who]()
        poison(device)
        error = relative_errors(c.common(c.run()), truth) if truth else None
        built[who] = c
        return {"error": error, "mib": peak_mib(c) if device == "cuda" else None, "note": c.note}

    for who in row.contenders:
        found[who] = attempt(who, first, who)
    truth = None                                                  # free its memory before the timing
    took = {who: [] for who in built}
    for turn in range(rounds):
        for who in [*built][::(1, -1)[turn % 2]]:
            took[who].append(attempt(who, times, built[who], row.together, device, ms))
    found = {who: found[who] | {"ms": [statistics.median(part) for part in zip(*took[who])]} for who in built}
    return {"row": name, "what": row.what, "together": row.together, "flops": row.flops, "bytes": row.bytes,
            "plain": plain or found.get("torch", {}).get("error"), "found": found, "failed": failed}


def judge(r):
    """Add two entries to r, a row of the result, and return it.

    "right"     is each error of our kernel at most twice the error of plain torch?
    "beside"    for forward and for backward: [time of the best alternative / our time, name of the alternative].
                Alternatives with more than four times the error of plain torch are left out.
    2^-22 is added to both limits, because the error of plain torch may be 0 by chance."""
    def exact(who, factor):
        e = r["found"][who]["error"]
        return not e or not r["plain"] or all(a <= factor * b + 2**-22 for a, b in zip(e, r["plain"]))
    ours = r["found"].get("ours")
    r["right"] = bool(ours and ours["error"] and r["plain"]) and exact("ours", 2)
    peers = [w for w in r["found"] if w != "ours" and exact(w, 4)]
    times = {w: r["found"][w]["ms"] for w in peers} if ours else {}
    best = [min(times, key=lambda w: times[w][part]) for part in range(len(ours["ms"]))] if times else []
    r["beside"] = [[times[w][part] / ours["ms"][part], w] for part, w in enumerate(best)]
    return r


def reason(e):
    """Return an exception as one line of text."""
    text = (str(e).strip() or "no reason given").splitlines()[0]
    return f"{type(e).__name__}: {text[:200]}"


def failed_row(name, why):
    return {"row": name, "plain": None, "found": {}, "failed": {"ours": why}}


def cells(r, ceilings):
    """Yield one list per contender of row r: the cells of its line in the table, one for each of COLUMNS."""
    for who, c in r["found"].items():
        key, rate = ("flops", "matmul") if any(r["flops"]) else ("bytes", "copy")
        work = [sum(r[key])] if r["together"] else r[key]
        yield [f"{r['row']}: {r['what']}" if who == "ours" else r["row"], f"{who} ({c['note']})" if c["note"] else who,
               " + ".join(f"{t:.3f}" for t in c["ms"]),
               ", ".join(f"{1e3 * w / t / ceilings[rate]:.0%}" for w, t in zip(work, c["ms"])),
               ", ".join(f"{ratio:.2f} of {peer}" for ratio, peer in r["beside"]) if who == "ours" else "",
               f"{max(c['error']):.1e}{'' if who != 'ours' or r['right'] else ' **too much**'}" if c["error"] else "",
               f"{c['mib']:.0f}" if c["mib"] else ""]
    for who, why in r["failed"].items():
        yield [r["row"], who, f"did not run: {why.replace('|', '/')}", *[""] * 4]


@dataclasses.dataclass
class Settings:
    rows: str = setting("all", "or some: A3,C1")
    size: str = setting("full", "tiny: toy sizes, to see that everything runs", choices=("full", "tiny"))
    device: str = setting("auto", "auto, cpu, cuda")
    rounds: int = setting(3, "rounds of timing; each measures all contenders", 1)
    ms: float = setting(100.0, "milliseconds of calls in each measurement")
    seconds: float = setting(3600.0, "no row begins later")
    row_seconds: float = setting(120.0, "a row that takes longer is stopped and named")
    out: str = setting("", "file for the page, which grows by each row")
    date: str = setting("", "of the page; empty = today")
    child: bool = setting(False, "measure in this process, one line of JSON per row (what the command itself starts)")


def measure_rows(s, names):
    """In the child process: print the ceilings (see bench.ceilings), then measure one row after another."""
    low = bench.LOW[s.device]
    # else a function that torch.compile made refuses a second backward pass, which `times` needs
    torch._functorch.config.donated_buffer = False
    if s.device == "cpu":
        torch.set_num_threads(1)
    bench.print_json({"ceilings": bench.ceilings(s.device)})
    for name in names:
        # ends this process if the row takes too long; it runs in a thread, so it works even if the GPU hangs
        faulthandler.dump_traceback_later(s.row_seconds, exit=True)
        torch.manual_seed(0)
        bench.print_json({"began": name})
        make, *sizes = ROWS[name] if s.size == "full" else shrink(*ROWS[name])
        try:
            bench.print_json(measure(name, make(*sizes, s.device, low), s.device, s.ms, s.rounds))
        except Exception as e:
            bench.print_json(failed_row(name, reason(e)))
        torch._dynamo.reset()
        faulthandler.cancel_dump_traceback_later()
        if s.device == "cuda":
            torch.cuda.empty_cache()


def main(s, args):
    s.device = bench.pick_device(s.device)
    names = bench.pick_rows(s.rows, ROWS, ROWS)
    config.check_ranges(s)
    if s.device == "cpu" and s.size == "full":
        config.stop("rows of full size need a GPU; --size=tiny runs on a CPU")
    if s.child:
        return measure_rows(s, names)
    end, rows, ceilings, left = time.time() + s.seconds, [], {}, list(names)
    options = [f"--{key}={getattr(s, key)}" for key in ("size", "device", "rounds", "ms", "row_seconds")]
    say = bench.open_page(s.out)
    say(f"# Kernels, {s.date}\n\n`python -m bench kernels{''.join(f' {a}' for a in args)}` on "
        f"{bench.describe_machine(s.device)}; ours: {'Triton kernels' if s.device == 'cuda' else 'plain torch'}.\n")
    while left and time.time() < end:
        began = left[0]
        for m in bench.child("kernels", [f"--rows={','.join(left)}", *options, "--child"], end - time.time()):
            began = m.get("began", began)
            if "ceilings" in m and not ceilings:
                ceilings = m["ceilings"]
                say(f"Ceilings: {ceilings['matmul'] / 1e12:.1f} TFLOP/s, {ceilings['copy'] / 1e9:.0f} GB/s.\n")
                say(f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|")
            if "ended" in m and began in left and time.time() < end:
                m = failed_row(began, f"the process ended with {m['ended']}: {m['because']}")
            if "row" in m:
                rows.append(judge(m))
                left.remove(m["row"])
                say("\n".join(f"| {' | '.join(line)} |" for line in cells(m, ceilings)))
    say(f"\nNot measured: {', '.join(left) or 'none'}.")
    bench.print_json({"ceilings": ceilings, "rows": rows, "not_measured": left})

"""Each kernel beside its alternatives, in one process, on the same values (the rows: bench/rows.py).

A contender is built, run once for its error against the definition in float64 and once for its memory. Then all
contenders are timed in turns. One that cannot run is named with its reason. Rows run in a child process, the most
important first; if it dies, a new child continues with the next row.
"""

import dataclasses
import faulthandler
import importlib
import math
import statistics
import time

import torch
import torch._functorch.config

import bench
import config
from bench.rows import ROWS, shrink
from config import setting

COLUMNS = ["row", "who", "ms", "of the ceiling", "ratio", "error", "MiB", "note"]


# ---- one row -------------------------------------------------------------------------------------------------------

def relative_errors(tensors, truth):
    """|t - truth| / |truth| of each tensor"""
    return [((t.double() - s).norm() / s.norm().clamp(min=1e-300)).item() for t, s in zip(tensors, truth, strict=True)]


def poison(device):
    """Fill memory with nan and free it: the next results are allocated there, so an element that a kernel forgets to
    write shows."""
    torch.full((1 << (30 if device == "cuda" else 16),), math.nan, device=device)


def peak_mib(c):
    """-> MiB that one run of a contender allocates at most, and MiB of its results"""
    c.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = c.run()
    torch.cuda.synchronize()
    return [n / 2**20 for n in (torch.cuda.max_memory_allocated() - before, sum(t.nbytes for t in got))]


def times(c, together, device, ms):
    """-> [ms of forward, ms of backward], or [ms of both]"""
    if together:
        return [bench.timed(c.run, device, ms)]
    out = c.forward()
    return [bench.timed(c.forward, device, ms),
            bench.timed(lambda: torch.autograd.grad(out, c.leaves, c.ups, retain_graph=True), device, ms)]


def measure(name, row, device, ms, rounds):
    """-> one row of the result: error, memory and time of each contender, and the reason for each that failed"""
    failed, found, built = {}, {}, {}

    def attempt(who, f, *args):
        """f(*args), or None and the reason noted. If the device itself no longer works, this process ends."""
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

    truth = attempt("truth", row.truth)                          # fails on a small card: then times without errors
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
    found = {who: found[who] for who in found if who in built}
    for who in found:
        parts = list(zip(*took[who]))
        found[who] |= {"ms": [statistics.median(p) for p in parts],
                       "spread": [(max(p) - min(p)) / statistics.median(p) for p in parts]}
    return {"row": name, "what": row.what, "together": row.together, "flops": row.flops, "bytes": row.bytes,
            "plain": plain or found.get("torch", {}).get("error"), "found": found, "failed": failed}


def judge(r):
    """Adds two entries to a row. right: each error of ours is at most 1.5 times that of plain torch. beside, for
    forward and backward: [time of the best alternative / ours, its name, is the difference within the spread]. An
    alternative counts if its errors are at most four times those of plain torch. 2^-22 is added to each budget: the
    error of a single fp32 value, such as a loss, is a matter of luck."""
    def exact(who, factor):
        e = r["found"][who]["error"]
        return not e or not r["plain"] or all(a <= factor * b + 2**-22 for a, b in zip(e, r["plain"]))
    ours = r["found"].get("ours")
    r["right"] = bool(ours and ours["error"] and r["plain"]) and exact("ours", 1.5)
    r["beside"] = []
    peers = [w for w in r["found"] if w != "ours" and exact(w, 4)]
    for part in range(len(ours["ms"]) if ours and peers else 0):
        best = min(peers, key=lambda w: r["found"][w]["ms"][part])
        them = r["found"][best]
        ratio = them["ms"][part] / ours["ms"][part]
        r["beside"].append([ratio, best, abs(ratio - 1) <= max(them["spread"][part], ours["spread"][part])])
    return r


def reason(e):
    """An exception in one line"""
    text = (str(e).strip() or "no reason given").splitlines()[0]
    return f"{type(e).__name__}: {text[:200]}"


def failed_row(name, why):
    return {"row": name, "what": "", "together": False, "flops": (0, 0), "bytes": (0, 0), "plain": None, "found": {},
            "failed": {"ours": why}}


# ---- the page ------------------------------------------------------------------------------------------------------

def shares(r, ms, ceilings):
    """-> work per second as a share of the ceiling, for forward and backward or both together"""
    key = "flops" if any(r["flops"]) else "bytes"
    work = [sum(r[key])] if r["together"] else r[key]
    return ", ".join(f"{1e3 * w / t / ceilings['matmul' if key == 'flops' else 'copy']:.0%}" for w, t in zip(work, ms))


def cells(r, ceilings):
    """A row -> one line of the table for each contender; the first also says what the row computes"""
    plain, beside = max(r["plain"] or [0]), [f"{'= ' * equal}{ratio:.2f} of {who}" for ratio, who, equal in r["beside"]]
    for who, c in r["found"].items():
        wrong = " **too much**" if who == "ours" and not r["right"] else ""
        yield [r["row"], who, " + ".join(f"{t:.3f}" for t in c["ms"]), shares(r, c["ms"], ceilings),
               ", ".join(beside) if who == "ours" else None,
               f"{max(c['error']):.1e} (plain {plain:.1e}){wrong}" if c["error"] else "not taken",
               " of which results ".join(f"{m:.0f}" for m in c["mib"]) if c["mib"] else None,
               r["what"] if who == "ours" else c["note"]]
    for who, why in r["failed"].items():
        yield [r["row"], who, "did not run", *[None] * 4, why.replace("|", "/")]


# ---- the command ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Settings:
    rows: str = setting("all", "or some: A3,C1")
    size: str = setting("full", "tiny: toy sizes, to see that everything runs", choices=("full", "tiny"))
    device: str = setting("auto", "auto, cpu, cuda")
    rounds: int = setting(3, "rounds of timing; each measures all contenders", 1)
    ms: float = setting(100.0, "milliseconds of calls in each measurement")
    seconds: float = setting(3600.0, "no row begins later")
    row_seconds: float = setting(120.0, "a row that takes longer is stopped and named")
    out: str = setting("", "file for the page, written after each row")
    date: str = setting("", "of the page; empty = today")
    child: bool = setting(False, "measure in this process, one line of JSON per row (what the command itself starts)")


def measure_rows(s, names):
    """In the child: ceilings, then row by row."""
    low, kernels = bench.LOW[s.device], importlib.import_module("kernels")
    torch._functorch.config.donated_buffer = False     # else torch.compile's result refuses a second backward pass
    if s.device == "cpu":
        torch.set_num_threads(1)
    bench.print_json({"ceilings": bench.ceilings(s.device), "triton": kernels.has_triton and s.device == "cuda"})
    for name in names:
        faulthandler.dump_traceback_later(s.row_seconds, exit=True)     # from a thread: works when the GPU hangs
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
    end, rows, head, ceilings, left = time.time() + s.seconds, [], {}, {}, list(names)
    machine = bench.describe_machine(s.device)
    print(machine, flush=True)

    def page():
        rows.sort(key=lambda r: [*ROWS].index(r["row"]))
        lines = [c for r in rows for c in cells(r, ceilings)]
        text = (f"# Kernels, {s.date}\n\n`python -m bench kernels{''.join(f' {a}' for a in args)}` on {machine}.\n\n"
                f"Ceilings: {ceilings.get('matmul', 0) / 1e12:.1f} TFLOP/s, {ceilings.get('copy', 0) / 1e9:.0f} GB/s; "
                f"ours: {'Triton kernels' if head.get('triton') else 'the definitions in torch'}.\n\n"
                + bench.table(COLUMNS, lines) + (f"\nNot measured: {', '.join(left)}.\n" if left else ""))
        return bench.write_page(text, s.out)

    while left and time.time() < end:
        began = left[0]
        for message in bench.child("kernels", [f"--rows={','.join(left)}", f"--size={s.size}", f"--device={s.device}",
                                               f"--rounds={s.rounds}", f"--ms={s.ms}", f"--row_seconds={s.row_seconds}",
                                               "--child"], end - time.time()):
            if "ceilings" in message:
                head, ceilings = message, message["ceilings"]
            elif "began" in message:
                began = message["began"]
            elif "row" in message or (began in left and time.time() < end):    # a row, or the child ended in one
                rows.append(judge(message if "row" in message else failed_row(
                    began, f"the process ended with {message['ended']}: {message['because']}")))
                left.remove(rows[-1]["row"])
                print(f"{rows[-1]['row']}: {rows[-1]['beside'] or rows[-1]['failed']}", flush=True)
                page()
    print("\n" + page(), flush=True)
    bench.print_json({"machine": machine, "ceilings": ceilings, "rows": rows, "not_measured": left})

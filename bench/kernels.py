"""Every kernel beside what else could be called, in one process, on the same numbers (the rows: bench/rows.py).

A contender is built, run once for its error against the definition in float64 and once for its memory, and then all of
them are timed by turns. One that cannot run is named with its reason. Rows run in a child process, in order of worth;
where it dies, another one goes on with the next row.
"""

import dataclasses
import faulthandler
import importlib
import math
import re
import statistics
import time

import torch
import torch._functorch.config

import bench
import config
from bench.rows import ROWS, shrunk

# ---- measuring -----------------------------------------------------------------------------------------------------

def apart(ts, true):
    """Relative errors: |t - true| / |true|"""
    return [((t.double() - s).norm() / s.norm().clamp(min=1e-300)).item() for t, s in zip(ts, true, strict=True)]


def poison(device):
    """What is freed here is what the next results are written into: memory that a kernel forgets shows."""
    torch.full((1 << (30 if device == "cuda" else 16),), math.nan, device=device)


def peak(c):
    """MiB that one run of a contender takes, and of these its results"""
    c.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = c.run()
    torch.cuda.synchronize()
    return [n / 2**20 for n in (torch.cuda.max_memory_allocated() - before, sum(t.nbytes for t in got))]


def times(c, together, device, ms):
    """-> ms of forward and backward, apart or together"""
    if together:
        return [bench.timed(c.run, device, ms)]
    out = c.forward()
    return [bench.timed(c.forward, device, ms),
            bench.timed(lambda: torch.autograd.grad(out, c.leaves, c.ups, retain_graph=True), device, ms)]


def measure(name, row, device, ms, rounds):
    """-> one row of the result: what every contender needed, erred and took, and who could not run"""
    failed, found, made = {}, {}, {}

    def tried(who, f, *args):
        """f(*args), or None and the reason noted. A device that does not work any more ends this process."""
        try:
            return f(*args)
        except Exception as e:
            failed[who] = bench.reason(e)
            made.pop(who, None)
        try:
            bench.sync(device)
            torch.cuda.empty_cache()
        except Exception as e:
            raise SystemExit(f"the device is lost: {bench.reason(e)}") from None

    true = tried("truth", row.truth)                                   # a smaller card: times without errors
    plain = tried("truth", lambda: apart(row.plain(), true)) if row.plain and true else None

    def first(who):
        c = row.contenders[who]()
        poison(device)
        error = apart(c.common(c.run()), true) if true else None
        made[who] = c
        return {"error": error, "mib": peak(c) if device == "cuda" else None, "note": c.note}

    for who in row.contenders:
        found[who] = tried(who, first, who)
    del true
    took = {who: [] for who in made}
    for turn in range(rounds):
        for who in [*made][::(1, -1)[turn % 2]]:
            took[who].append(tried(who, times, made[who], row.together, device, ms))
    for who in [*found]:
        if who not in made:
            del found[who]
            continue
        parts = list(zip(*took[who]))
        found[who] |= {"ms": [statistics.median(p) for p in parts],
                       "spread": [(max(p) - min(p)) / statistics.median(p) for p in parts]}
    return {"row": name, "what": row.what, "together": row.together, "flops": row.flops, "bytes": row.bytes,
            "plain": plain or found.get("torch", {}).get("error"), "found": found, "failed": failed}


def judge(r):
    """Adds to a row: is every error at most 1.5 times plain torch's; ours beside the best peer that is as right as we
    ask of ourselves, times four: [ratio, name, equal within the spread] for forward and backward. A few roundings in
    fp32 are granted: of a single number, as a loss, luck decides."""
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


# ---- the page ------------------------------------------------------------------------------------------------------

PAGE = """# Kernels, {date}

`python -m bench kernels{args}` on {machine}; {after}.

Measured ceilings: {tflops:.0f} TFLOP/s in a product of two {low} matrices, {gbs:.0f} GB/s in a copy; shares are of
these. Medians of {rounds} rounds by turns; ratio = the best peer's time over ours, = where the difference lies within
the spread of the rounds. Error: the largest of |x - true| / |true| over outputs and gradients, true in float64; plain
is the same of the definition in torch. bench/README.md says more.

"""
KINDS = {"A": "attention", "C": "cross-entropy", "E": "element-wise", "L": "adapters"}


def speed(r, ms):
    """-> TFLOP/s or GB/s, which ceiling that is a share of, and its unit"""
    for key, unit, ceiling in (("flops", 1e9, "matmul"), ("bytes", 1e6, "copy")):
        work = [sum(r[key])] if r["together"] else r[key]
        if any(work):
            return [w / t / unit for w, t in zip(work, ms)], ceiling, unit * 1e3


def summary(r, ceilings):
    """Cells of a row: ours beside the best"""
    ours = r["found"].get("ours")
    if not ours:
        return [r["row"], r["what"], f"**{r['failed'].get('ours', 'failed')}**", *[None] * 7]
    per_s, ceiling, unit = speed(r, ours["ms"])
    return [r["row"], r["what"], " + ".join(f"{t:.3f}" for t in ours["ms"]),
            ", ".join(f"{v * unit / ceilings[ceiling]:.0%}" for v in per_s),
            ", ".join(f"{'= ' * equal}{ratio:.2f}" for ratio, _, equal in r["beside"]) or None,
            ", ".join(dict.fromkeys(name for _, name, _ in r["beside"])) or "none ran",
            f"{max(ours['error']):.1e}{'' if r['right'] else ' **too much**'}" if ours["error"] else "not taken",
            f"{max(r['plain']):.1e}" if r["plain"] else None,
            *([f"{m:.0f}" for m in ours["mib"]] if ours["mib"] else [None, None])]


def details(r):
    """Cells of one line for each contender, those that did not run with their reason"""
    for who, c in r["found"].items():
        yield [r["row"], who, " + ".join(f"{t:.3f}" for t in c["ms"]),
               ", ".join(f"{v:.0f}" for v in speed(r, c["ms"])[0]), f"{max(c['spread']):.0%}",
               f"{max(c['error']):.1e}" if c["error"] else None, f"{c['mib'][0]:.0f}" if c["mib"] else None, c["note"]]
    for who, why in r["failed"].items():
        yield [r["row"], who, "did not run", *[None] * 4, why.replace("|", "/")]


def page(rows, ceilings, head):
    text = PAGE.format(tflops=ceilings["matmul"] / 1e12, gbs=ceilings["copy"] / 1e9, **head)
    text += bench.table(["row", "what", "ours, ms", "of the ceiling", "ratio", "best peer", "error", "plain", "MiB",
                         "of which results"], [summary(r, ceilings) for r in rows])
    for letter, kind in KINDS.items():
        if ratios := [b[0] for r in rows if r["row"].startswith(letter) for b in r["beside"]]:
            mean = statistics.geometric_mean(ratios)
            text += f"\nGeometric mean of {kind}: {mean:.2f} of the best peer, {len(ratios)} ratios.\n"
    text += "\n" + bench.table(["row", "who", "ms", "TFLOP/s or GB/s", "spread", "error", "MiB", "note"],
                               [cells for r in rows for cells in details(r)])
    missing = {why for r in rows for why in r["failed"].values() if re.search("No module named|^Attr.*module '", why)}
    return text + "".join(f"\nMissing here: {why}\n" for why in sorted(missing))


# ---- the command ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Settings:
    rows: str = "all"              # or some: A3,C1
    size: str = "full"             # full, tiny: toy sizes, to see that everything runs
    device: str = "auto"           # auto, cuda, cpu
    rounds: int = 3                # by turns
    ms: float = 100.0              # of repetitions in each measurement
    seconds: float = 3600.0        # no row begins later
    row_seconds: float = 120.0     # a row that takes longer is ended, and named
    out: str = ""                  # file for the page
    date: str = ""                 # of the page; empty = today
    child: bool = False            # measure here, one line of JSON for each row (what the command starts)


def here(s, names):
    """In the child: ceilings, then row by row."""
    low, kernels = bench.LOW[s.device], importlib.import_module("kernels")
    torch._functorch.config.donated_buffer = False     # or what torch.compile made refuses a second backward pass
    if s.device == "cpu":
        torch.set_num_threads(1)
    bench.write_line({"ceilings": bench.ceilings(s.device), "kernels": kernels.here and s.device == "cuda"})
    for name in names:
        faulthandler.dump_traceback_later(s.row_seconds, exit=True)     # from a thread: a hung GPU cannot stop it
        torch.manual_seed(0)
        bench.write_line({"began": name})
        make, *sizes = ROWS[name] if s.size == "full" else shrunk(*ROWS[name])
        try:
            bench.write_line(measure(name, make(*sizes, s.device, low), s.device, s.ms, s.rounds))
        except Exception as e:
            bench.write_line(broken(name, bench.reason(e)))
        torch._dynamo.reset()
        faulthandler.cancel_dump_traceback_later()
        if s.device == "cuda":
            torch.cuda.empty_cache()


def broken(name, why):
    return {"row": name, "what": "", "together": False, "flops": (0, 0), "bytes": (0, 0), "plain": None, "found": {},
            "failed": {"ours": why}}


def say(r):
    mine = r["found"].get("ours")
    took = " + ".join(f"{t:.3f}" for t in mine["ms"]) + " ms; " if mine else "ours failed; "
    print(f"{r['row']}: {took}" + "; ".join(f"{ratio:.2f} of {name}" for ratio, name, _ in r["beside"])
          + "".join(f"\n    {who} did not run: {why}" for who, why in r["failed"].items()), flush=True)


def main(s, args):
    s.device = bench.choose(s.device)
    names = bench.picked(s.rows, ROWS, ROWS)
    if s.size not in ("full", "tiny") or s.rounds < 1:
        config.stop(f"size={s.size}, rounds={s.rounds}: full or tiny, at least 1")
    if s.device == "cpu" and s.size == "full":
        config.stop("rows of full size are for a GPU; --size=tiny shows on a CPU that they run")
    if s.child:
        return here(s, names)
    end, rows, ceilings, left = time.time() + s.seconds, [], None, list(names)
    machine = bench.machine(s.device)
    print(machine, flush=True)

    def report():
        """The page as far as it is known: a file has it after every row, whatever becomes of this run"""
        rows.sort(key=lambda r: [*ROWS].index(r["row"]))
        after = f"afterwards {bench.machine(s.device).split(';')[0]}"          # the clocks of a GPU, the load of a CPU
        head = dict(date=s.date, args="".join(f" {a}" for a in args), machine=machine, rounds=s.rounds, after=after,
                    low=str(bench.LOW[s.device]).removeprefix("torch."))
        text = page(rows, ceilings, head) if ceilings else ""
        return bench.keep(text + (f"\nNot measured: {', '.join(left)}.\n" if left else ""), s.out)

    while left and time.time() < end:
        began = left[0]
        for said in bench.child("kernels", [f"--rows={','.join(left)}", f"--size={s.size}", f"--device={s.device}",
                                            f"--rounds={s.rounds}", f"--ms={s.ms}", f"--row_seconds={s.row_seconds}",
                                            "--child"], end - time.time()):
            if "ceilings" in said:
                ceilings = ceilings or said["ceilings"]
                print(f"{ceilings['matmul'] / 1e12:.1f} TFLOP/s, {ceilings['copy'] / 1e9:.0f} GB/s; ours are "
                      f"{'Triton kernels' if said['kernels'] else 'the definitions in torch'}", flush=True)
            elif "began" in said:
                began = said["began"]
            elif "row" in said or (began in left and time.time() < end):       # or it ended, and not because it was to
                rows.append(judge(said if "row" in said else broken(
                    began, f"the process ended with {said['ended']}: {said['because']}")))
                left.remove(rows[-1]["row"])
                say(rows[-1])
                report()
    print("\n" + report(), flush=True)
    bench.write_line({"machine": machine, "ceilings": ceilings, "rows": rows, "not_measured": left})

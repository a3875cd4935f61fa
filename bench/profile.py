"""Where the time of our training step goes: one step under torch's profiler, in a process of its own.

busy       share of the step in which the GPU computes: the sum of its kernels over the time between two events
products   TFLOP/s of the matrix products: needed FLOPs (bench/systems.py) over the time of their kernels
casts      bytes read and written by operators that change a dtype, and by autograd's sums of gradients
"""

import dataclasses
import time

import torch

import bench
import config
from bench.step import clocked, ours
from bench.systems import NAMES, conversations, system, work
from config import setting

# group -> words in the names of its kernels (on a CPU: of operators). The first group that fits counts: attention's
# kernels are called _forward, _backward_q, _backward_kv, and norm_forward is another one
GROUPS = {"products": ("gemm", "cutlass", "cublas", "splitk", "xmma", "nvjet", "addmm", "aten::mm"),
          "cross-entropy": ("logits_to_gradient", "cross_entropy"), "SwiGLU": ("swiglu", "silu"),
          "norms": ("norm_forward", "norm_backward", "layer_norm", "rmsnorm"),
          "attention": ("_forward", "_backward", "attention"), "rotation": ("rope",), "NF4": ("nf4",),
          "AdamW and clipping": ("adam", "multi_tensor", "foreach"),
          "copies and casts": ("copy", "memcpy", "memset", "fill")}


class Casts(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes read and written by casts, and by additions in place (autograd's sums of gradients)"""

    def __init__(self):
        super().__init__()
        self.casts = self.sums = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out, name = f(*args, **kwargs or {}), f.__name__.partition(".")[0]
        if name == "_to_copy" and out.dtype != args[0].dtype:
            self.casts += args[0].nbytes + out.nbytes
        elif name == "add_" and isinstance(args[1], torch.Tensor):
            self.sums += 2 * args[0].nbytes + args[1].nbytes
        return out


@dataclasses.dataclass
class Settings:
    rows: str = setting("S1,S2,S4,S3", "rows of bench/systems.py")
    size: str = setting("", "full, tiny; empty: by device")
    device: str = setting("auto", "auto, cuda, cpu")
    room: int = setting(0, "tokens of a packed sequence; 0 = as the row says", 0)
    seconds: float = setting(3600.0, "no row starts later, and none takes longer", 0)
    out: str = setting("", "file for the page, which grows by each row")
    date: str = setting("", "of the page; empty: today")
    child: bool = setting(False, "measure in this process (what the command itself starts)")


def kernel_times(prof, device):
    """-> {name: seconds} of the GPU's kernels; on a CPU, of operators"""
    found = {}
    for e in prof.events():
        if device == "cuda" and e.device_type == torch.autograd.DeviceType.CUDA:
            found[e.name] = found.get(e.name, 0) + e.time_range.elapsed_us() / 1e6
        elif device == "cpu":
            found[e.name] = found.get(e.name, 0) + e.self_cpu_time_total / 1e6
    return found


def group_of(kernel):
    return next((group for group, words in GROUPS.items() if any(w in kernel.lower() for w in words)), "others")


def measure(name, size, device, room):
    """-> dict: times of a step, of its groups of kernels, of its ten longest kernels; bytes; peak memory"""
    s = system(name, size)
    s = dataclasses.replace(s, room=room) if room else s
    prepare, step, _ = ours(s, device)
    made = [conversations(s, n) for n in range(4)]
    for n in range(2):                                            # compiles kernels; the moments are made
        step(prepare(made[n]))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    micro = prepare(made[2])
    _, seconds = clocked(lambda: step(micro), device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    with Casts() as casts:
        step(prepare(made[2]))
    kinds = [torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as prof:
        step(prepare(made[2]))
        bench.sync(device)
    kernels, groups = kernel_times(prof, device), {}
    for kernel, t in kernels.items():
        groups[group_of(kernel)] = groups.get(group_of(kernel), 0) + t
    products = work(s, made[2])[0]
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:10]
    return {"row": name, "streams": [len(b.ids) for b in micro], "seconds": seconds, "busy": sum(groups.values()),
            "groups": groups, "products": products, "casts": casts.casts, "sums": casts.sums, "peak": peak,
            "longest": longest}


def lines(r):
    """-> the result of measure() as lines of a page"""
    rate = r["products"] / r["groups"]["products"] if r["groups"].get("products") else float("nan")
    yield (f"\n{r['row']}, sequences of {', '.join(map(str, r['streams']))} tokens: {1e3 * r['seconds']:.1f} ms, busy "
           f"{r['busy'] / r['seconds']:.0%}, products {rate / 1e12:.3g} TFLOP/s, casts {r['casts'] / 1e9:.3g} GB, sums "
           f"{r['sums'] / 1e9:.3g} GB, peak {r['peak'] / 2**30:.1f} GiB\n")
    yield "| what | ms | share |\n| --- | --- | --- |"
    for what, t in sorted(r["groups"].items(), key=lambda item: -item[1]):
        yield f"| {what} | {1e3 * t:.2f} | {t / r['busy']:.1%} |"
    for what, t in r["longest"]:
        yield f"| `{what[:100].replace('|', '/')}` | {1e3 * t:.2f} | {t / r['busy']:.1%} |"


def main(s, args):
    s.device = bench.pick_device(s.device)
    s.size = s.size or {"cuda": "full", "cpu": "tiny"}[s.device]
    names = bench.pick_rows(s.rows, NAMES["cuda"], NAMES["cuda"])
    config.check_ranges(s)
    if s.size not in ("full", "tiny") or (s.device, s.size) == ("cpu", "full"):
        config.stop(f"size={s.size}, device={s.device}: full (on a GPU) or tiny")
    if s.child:
        return bench.print_json(measure(names[0], s.size, s.device, s.room))
    end, say, rows = time.time() + s.seconds, bench.open_page(s.out), []
    say(f"# Profile of a training step, {s.date}\n\n`python -m bench profile{''.join(f' {a}' for a in args)}` on "
        f"{bench.describe_machine(s.device)}.")
    for name in names:
        if end - time.time() < 1:
            say(f"\n{name}: not begun within {s.seconds:.0f} s")
            continue
        *found, last = bench.child("profile", [f"--rows={name}", f"--size={s.size}", f"--device={s.device}",
                                               f"--room={s.room}", "--child"], end - time.time())
        if not found or last["ended"]:
            say(f"\n{name}: did not run, ended with {last['ended']}: {last['because']}")
            continue
        rows.append(found[-1])
        say("\n".join(lines(rows[-1])))
    bench.print_json({"rows": rows})

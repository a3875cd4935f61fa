"""The benchmarks compare what they claim to compare. The code that a GPU will run runs here at toy size."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
import types
import zipfile

import conftest
import pytest
import torch
from conftest import FOREVER, ROOT, tiny_config

import bench
import config
import data
from bench import kernels, profile, rows, step, systems, tiles
from config import Error
from model import VLM
from run.arguments import parse

SMALL = systems.System(tiny_config(rms_norm_eps=1e-6), "sft", 3, ("theirs",), {}, 0.5)
JSON = dict(parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# ---- steps ---------------------------------------------------------------------------------------------------------

def test_both_sides_get_the_same_batch():
    made = step.conversations(SMALL, 2)
    packed, padded = data.pack(made, 8), step.pad(SMALL.cfg, made)
    real = padded["attention_mask"] == 1
    assert torch.equal(padded["input_ids"][real], packed.ids)
    assert len(set(real.sum(1).tolist())) == 3 and real.shape[1] == max(len(ids) for ids, _, _ in made)
    assert int((padded["labels"] >= 0).sum()) == int((packed.labels >= 0).sum())
    not_last = packed.pos.roll(-1) > 0                          # transformers shifts its labels itself
    assert torch.equal(padded["labels"][:, 1:][real[:, 1:]], packed.labels[not_last])
    assert padded["pixel_values"].shape == packed.images.shape and len(packed.images) == 3


@pytest.mark.parametrize("row", step.NAMES["cpu"])
def test_batches_are_ragged_and_sparsely_supervised(row):
    s = step.system(row)
    batches = [step.conversations(s, n) for n in range(1, 6)]
    real = sum(len(ids) for made in batches for ids, _, _ in made)
    padded = sum(len(made) * max(len(ids) for ids, _, _ in made) for made in batches)
    supervised = sum(i >= 0 for made in batches for _, labels, _ in made for i in labels)
    assert 1.3 < padded / real < 1.75 and 0.12 < supervised / real < 0.2


def test_the_mixture_has_the_expected_lengths():
    """Mean 839 tokens, 15.6 % supervised; a batch of 16, padded to its longest, has 1.62 times its tokens."""
    drawn = bench.draw_lengths(16 * 1000, torch.Generator().manual_seed(0))
    tokens = [n + 576 * images for n, _, images in drawn]
    assert sum(tokens) / len(tokens) == pytest.approx(839, rel=0.02)
    assert sum(n * share for n, share, _ in drawn) / sum(tokens) == pytest.approx(0.156, abs=0.01)
    padded = sum(16 * max(tokens[i : i + 16]) for i in range(0, len(tokens), 16))
    assert padded / sum(tokens) == pytest.approx(1.62, abs=0.06)


@pytest.mark.parametrize("row, peer", [("step_sft", "theirs"), ("S1", "theirs+ckpt"), ("S2", "theirs"),
                                       ("S4", "theirs+sorted"), ("S5", "theirs")])
def test_transformers_takes_the_same_steps(row, peer):
    """Stage 1, whole, through adapters, tied embeddings, SigLIP; in one packed sequence and in several."""
    pytest.importorskip("transformers")
    if row == "S2":
        pytest.importorskip("peft")
    s = dataclasses.replace(SMALL, stage=row[5:]) if row.startswith("step") else step.system(row, "tiny")
    made = [step.conversations(s, n) for n in range(3)]
    got = []
    for make in (lambda: step.ours(s, "cpu"), lambda: step.theirs(s, "cpu", *peer.split("+")[1:])):
        prepare, take, _ = make()
        got.append([take(prepare(m)) for m in made])
        if not row.startswith("step"):
            assert 1 < len(prepare(made[0])) <= len(prepare(made[0], 0.5))
    # losses near log 512 = 6.2 in fp32, whose sums over a few hundred terms differ in the last bits; AdamW's first
    # steps are lr * sign(gradient), so a gradient that is off would move the later losses by far more than 1e-4
    assert got[0] == pytest.approx(got[1], abs=1e-4) and abs(got[0][2] - got[0][0]) > 1e-3


@pytest.mark.parametrize("row, flops, per_s", [("S1", 15.8, 49.5), ("S2", 24.0, 32.5), ("S3", 33.1, 23.7),
                                               ("S4", 5.33, 145), ("S4b", 5.38, 145)])
def test_the_floor_matches_hand_calculation(row, flops, per_s):
    """TFLOP and samples/s at 790 TFLOP/s; conversations of 595 tokens (3 % supervised), of 840 (15.5 %, 0.94 images)"""
    s = step.system(row)
    tokens, supervised, images = (595, 18, 50) if s.stage == "align" else (840, 130, 47)
    made = [([0] * tokens, [-100] * (tokens - supervised) + [0] * supervised, [0] * (i < images)) for i in range(50)]
    products, forward, backward = step.work(s, made)
    assert (products + forward + backward) / 50e12 == pytest.approx(flops, rel=0.005)
    assert 50 / (products / 790e12 + forward / 600e12 + backward / 500e12) == pytest.approx(per_s, rel=0.005)


def test_a_measurement_is_a_process_that_prints_json():
    args = ["--rows=S2", "--side=ours", "--steps=1", "--size=tiny", "--device=cpu"]
    *_, found, ended = bench.child("step", args, FOREVER)
    assert len(found["losses"]) == 2 and found["seconds"] > 0 and found["peak"] > found["imported"] > 2**20
    assert ended["ended"] == 0


def test_a_process_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "sleeps").write_text("#!/bin/sh\nexec sleep 600")
    (tmp_path / "sleeps").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "sleeps"))
    assert [*bench.child("step", [], 1)] == [{"ended": -9, "because": "stopped after 1 s"}]


def test_out_of_memory_halves_the_batches(monkeypatch):
    parts = []

    def ours(s, device):
        def take(part):
            parts.append(part)
            if part > 0.3 and len(parts) > 2:
                raise torch.OutOfMemoryError("no room")
            return 5.0 + len(parts)
        return lambda made, part: part, take, torch.optim.SGD([torch.zeros(1)])
    monkeypatch.setattr(step, "ours", ours)
    monkeypatch.setattr(step, "conversations", lambda s, n: n)
    found = step.measure("step_sft", "ours", 2)
    assert parts == [1, 1, 1, 0.5, 0.25, 0.25, 0.25] and found["part"] == 0.25 and found["losses"][0] == 6.0


class Fake:
    """bench.child, answering for both sides"""

    def __init__(self, monkeypatch, seconds, losses=(7.0, 6.0)):
        self.seconds = iter(seconds)
        self.losses = losses
        monkeypatch.setattr(bench, "child", self)

    def __call__(self, command, args, seconds):
        side = next(a[7:] for a in args if a.startswith("--side="))
        t = next(self.seconds)
        if t is None:
            yield {"ended": 1, "because": "ModuleNotFoundError: No module named 'transformers'"}
            return
        peak = {"ours": 2**30}.get(side, 2**31)
        yield {"losses": [self.losses[0] + (side != "ours") * self.losses[1], 5.0], "seconds": t, "peak": peak,
               "imported": 2**20, "part": 1.0}
        yield {"ended": 0, "because": ""}


def run_step(capsys, **settings):
    usual = {"device": "cpu", "rows": "toy_sft", "repeats": 3, "steps": 2, "date": "2026-01-02"}
    step.main(step.Settings(**usual | settings), [])
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1], **JSON)


def test_ratios_are_of_pairs(monkeypatch, capsys, tmp_path):
    Fake(monkeypatch, [1.0, 3.0, 5.0, 2.0, 1.0, 4.0], (7.0, 0.0))      # ours, theirs | theirs, ours | ours, theirs
    out, found = run_step(capsys, out=str(tmp_path / "new" / "page.md"))
    row, = found["rows"]
    assert row["speed"] == 3 and row["speed_range"] == [2.5, 4] and row["memory"] == 0.5 and row["reached"]
    page = (tmp_path / "new" / "page.md").read_text()
    assert out.startswith(page) and page.startswith("# Training steps, 2026-01-02") and "NOT THE SAME" not in page
    assert page.splitlines()[-1].startswith("- toy_sft: **3.00** times as fast as theirs (2.50 to 4.00), **0.50** of")
    assert sum(line.startswith("- toy_sft ") for line in page.splitlines()) == 6       # one for each process


def test_different_losses_are_reported(monkeypatch, capsys):
    Fake(monkeypatch, [1.0] * 2, (7.0, 0.5))
    out, found = run_step(capsys, repeats=1)
    assert not found["rows"][0]["agree"] and not found["rows"][0]["reached"]
    assert "**NOT THE SAME STEPS**" in out


def test_a_peer_that_cannot_run_is_named(monkeypatch, capsys):
    Fake(monkeypatch, [1.0, None, 1.0, 2.0], (7.0, 0.0))               # theirs of the first row cannot
    out, found = run_step(capsys, rows="toy_align,toy_sft", repeats=1)
    assert [(r["row"], r["peer"]) for r in found["rows"]] == [("toy_align", None), ("toy_sft", "theirs")]
    assert "toy_align: 32.0 samples/s; no peer ran" in out                  # ours is printed all the same
    assert found["failed"] == {"toy_align, theirs": "ModuleNotFoundError: No module named 'transformers'"}
    assert "toy_align, theirs: did not run, ended with 1: ModuleNotFoundError" in out
    Fake(monkeypatch, [], (7.0, 0.0))
    assert "not begun" in run_step(capsys, seconds=0.0)[1]["failed"]["toy_sft, ours"]


def test_a_gpu_page_shows_its_shares(monkeypatch):
    same = {"losses": [10.0], "peak": 2**35, "imported": 0}
    pair = [same | {"seconds": t, "part": p} for t, p in ((1.0, 1.0), (2.0, 0.5))]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    ceilings = {"matmul": 790e12, "copy": 4e12}
    r = step.compare("S1", [pair], 2, "full", "cuda", ceilings, "theirs+liger")
    assert 0.6 < r["of_floor"] < 0.7 and r["mfu"] == pytest.approx(r["of_floor"] * 790 / 989, rel=0.03)
    assert r["reached"] and r["goal"] == 1.1
    alone = step.compare("S1", [pair[:1]], 2, "full", "cuda", ceilings, None)
    assert [alone[k] for k in ("mfu", "of_floor")] == [r[k] for k in ("mfu", "of_floor")]
    assert "(micro-batch x 0.5)" in step.sentence(r) and "goal 1.1" in step.sentence(r)
    for row in (r, alone):
        assert f"MFU {r['mfu']:.1%}, " in step.sentence(row)
        assert f"{r['of_floor']:.0%} of the floor" in step.sentence(row)


# ---- kernels -------------------------------------------------------------------------------------------------------

def make_row(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f=None, **how: f or (lambda g: g))  # the C++ compiler takes minutes
    torch.manual_seed(0)
    make, *sizes = rows.shrink(*rows.ROWS[name])
    return make(*sizes, "cpu", torch.float32)


# contenders that may be missing or refuse to run on a CPU, and the error they raise
EXCUSED = {"sdpa cudnn": "RuntimeError", "sdpa efficient": "RuntimeError", "varlen_attn": "NotImplementedError",
           "flex": "NotImplementedError", "peft": "ModuleNotFoundError", "bitsandbytes": "ModuleNotFoundError",
           "F.linear_cross_entropy": "AttributeError"}


# one row of each kind: ragged and even, causal and not, grouped; head trained and frozen; one layer and three
@pytest.mark.parametrize("name", ["A3", "A2", "A8", "C2", "C6", "E1", "E1r", "E2", "E3", "L1a", "L1c", "Q1"])
def test_a_row_runs_at_toy_size(name, monkeypatch):
    """Each contender runs and errs no more than plain torch, or fails with the expected error."""
    r = kernels.judge(kernels.measure(name, make_row(name, monkeypatch), "cpu", 0.1, 1))
    assert r["right"] and r["found"]["ours"]["ms"] and r["beside"]
    for who, c in r["found"].items():
        assert max(c["error"]) < 2e-6, who
    for who, why in r["failed"].items():
        kind = "ModuleNotFoundError" if who.startswith(("liger", "cce")) else EXCUSED[who]
        assert why.startswith(kind), f"{who}: {why}"
    lines = [*kernels.cells(r, {"matmul": 1e12, "copy": 1e10})]
    assert len(lines) == len(r["found"]) + len(r["failed"]) and {*map(len, lines)} == {len(kernels.COLUMNS)}
    json.dumps(r, allow_nan=False)


def test_all_rows_are_there():
    assert {*rows.ROWS} == {*(f"A{n}" for n in range(1, 11)), *(f"C{n}" for n in range(1, 9)),
                            "E1", "E1r", "E2", "E3", "L1a", "L1b", "L1c", "Q1"}
    assert sum(rows.ROWS["A3"][1]) == 8192 and sum(rows.ROWS["A7"][1]) == 16384 and min(rows.ROWS["A3"][1]) > 0
    work = {"A5": (696e-6, 1740e-6), "A10": (696e-6, 1740e-6), "A6": (2.78e-3, 6.96e-3)}
    for name, floors in work.items():                                    # seconds at 790 TFLOP/s
        lengths, H, G, K, causal = rows.ROWS[name][1:]
        pairs = sum(t * (t + 1) // 2 if causal else t * t for t in lengths)
        assert [4 * pairs * H * K / 790e12, 10 * pairs * H * K / 790e12] == pytest.approx(floors, rel=0.01)


def test_flex_and_varlen_accept_their_arguments(monkeypatch):
    """Neither trains on a CPU. The forward pass of FlexAttention runs uncompiled; varlen_attn runs on fake tensors,
    where its operator checks shapes and options."""
    import inspect

    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention.varlen import varlen_attn
    for name in ("A3", "A1", "A8"):
        row = make_row(name, monkeypatch)
        c = row.contenders["flex"]()
        for t in c.leaves:
            t.requires_grad_(False)
        assert kernels.relative_errors(c.common([c.forward()[0].detach()]), row.truth()[:1])[0] < 1e-6
        with FakeTensorMode(allow_non_fake_inputs=True):
            q = torch.empty(8, 4, 64, device="cuda", dtype=torch.bfloat16)
            bounds = torch.empty(3, device="cuda", dtype=torch.int32)
            out = varlen_attn(q, q, q, bounds, bounds, 5, 5, window_size=(-1, 0))
        assert out.shape == q.shape
    inspect.signature(varlen_attn).bind(q, q, q, bounds, bounds, 5, 5, window_size=(-1, 0))


def test_a_fast_wrong_peer_does_not_count():
    def row(**who):
        found = {name: {"ms": ms, "error": e, "mib": None, "note": ""} for name, (ms, e) in who.items()}
        return kernels.judge({"row": "E2", "what": "", "found": found, "failed": {}, "plain": [1e-3, 1e-3],
                              "flops": (1, 1), "together": True})
    r = row(ours=([2.0], [1e-3, 1.9e-3]), a=([3.0], [1e-3, 1e-3]), wrong=([1.0], [1e-3, 9e-3]),
            nan=([1.0], [1e-3, math.nan]))
    assert r["right"] and r["beside"] == [[1.5, "a"]]                   # `wrong` and `nan` are faster
    for error in (2.1e-3, math.nan):
        r = json.loads(json.dumps(row(ours=([2.0], [1e-3, error]))))     # as a child sends it
        assert not r["right"] and "**too much**" in [*kernels.cells(r, {"matmul": 1.0})][0][5]


def test_a_failing_contender_does_not_stop_the_others(monkeypatch):
    row = make_row("E2", monkeypatch)
    good, calls = row.contenders["torch"], iter(range(99))

    def late():
        c = good()
        forward = c.forward
        c.forward = lambda: forward() if next(calls) < 1 else 1 / 0
        return c
    row.contenders |= {"late": late, "never": lambda: 1 / 0,
                       "odd": lambda: dataclasses.replace(good(), forward=lambda: ())}
    r = kernels.judge(kernels.measure("E2", row, "cpu", 0.1, 1))
    assert {"ours", "torch"} <= {*r["found"]} and not {"late", "never", "odd"} & {*r["found"]}
    assert r["failed"]["late"] == r["failed"]["never"] == "ZeroDivisionError: division by zero" and "odd" in r["failed"]


class Event:
    """torch.cuda.Event by the clock of the CPU"""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def test_gpu_timing_runs_on_a_simulated_gpu(monkeypatch):
    """Events, a flushed cache, peak memory: on tensors of the CPU."""
    row, empty = make_row("E2", monkeypatch), torch.empty
    for name, f in {"Event": Event, "synchronize": lambda: None, "_sleep": lambda cycles: None,
                    "reset_peak_memory_stats": lambda: None,
                    "memory_allocated": lambda: 2**20, "max_memory_allocated": lambda: 3 * 2**20}.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, f)
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: empty(n >> 20, dtype=dtype))
    monkeypatch.setattr(kernels, "poison", lambda device: None)
    r = kernels.judge(kernels.measure("E2", row, "cuda", 0.1, 2))
    ours = r["found"]["ours"]
    assert r["right"] and len(ours["ms"]) == 2 and min(ours["ms"]) > 0
    assert ours["mib"] == 2
    result, seconds = step.clocked(lambda: time.sleep(0.01) or 7, "cuda")
    assert result == 7 and seconds >= 0.01


def test_a_process_that_dies_costs_one_row(monkeypatch, capsys, tmp_path):
    calls, pages, page = [], [], tmp_path / "new" / "page.md"

    def child(command, args, seconds):
        calls.append(args[0])
        yield {"ceilings": {"matmul": 1e12, "copy": 1e10}}
        for name in args[0].removeprefix("--rows=").split(","):
            pages.append(page.read_text())
            yield {"began": name}
            if name == "A3":
                yield {"ended": -11, "because": "illegal memory access"}
                return
            yield kernels.failed_row(name, "ValueError: no" if name == "E2" else "KeyError: 1")
        yield {"ended": 0, "because": ""}
    monkeypatch.setattr(bench, "child", child)
    kernels.main(kernels.Settings(rows="E2,A3,E1", size="tiny", device="cpu", out=str(page)), [])
    assert [[f"| {name} |" in text for name in ("E2", "A3")] for text in pages] == [
        [False, False], [True, False], [True, True]]                     # written after each row
    assert page.read_text().endswith("Not measured: none.\n") and page.read_text().count("Ceilings") == 1
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1], **JSON)
    assert calls == ["--rows=E2,A3,E1", "--rows=E1"] and found["not_measured"] == []
    assert {r["row"]: r["failed"]["ours"] for r in found["rows"]} == {
        "A3": "the process ended with -11: illegal memory access", "E1": "KeyError: 1", "E2": "ValueError: no"}
    kernels.main(kernels.Settings(rows="E2", size="tiny", device="cpu", seconds=-1.0), [])
    assert json.loads(capsys.readouterr().out.splitlines()[-1], **JSON)["not_measured"] == ["E2"]


def test_the_kernels_command_writes_its_page(tmp_path, capsys, monkeypatch):
    page, limits = tmp_path / "page.md", []
    monkeypatch.setattr(kernels.faulthandler, "dump_traceback_later", lambda t, exit: limits.append((t, exit)))

    def child(command, args, seconds):
        """The child's work, in this process"""
        capsys.readouterr()
        kernels.main(parse(kernels.Settings, args), [])
        yield from map(json.loads, capsys.readouterr().out.splitlines())
        yield {"ended": 0, "because": ""}
    monkeypatch.setattr(bench, "child", child)
    kernels.main(kernels.Settings(rows="A8,A2", size="tiny", device="cpu", ms=0.1, rounds=1, out=str(page)), [])
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1], **JSON)
    assert [r["row"] for r in found["rows"]] == ["A8", "A2"] and found["ceilings"]["matmul"] > 0
    assert limits == [(120.0, True)] * 2
    assert page.read_text().startswith("# Kernels, ") and "ours: plain torch" in page.read_text()


# ---- both ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("part, settings, complaint", [
    (step, dict(rows="x"), "rows=x"), (step, dict(device="x"), "auto, cuda or cpu"),
    (step, dict(repeats=-1), "at least 0"),
    (step, dict(side="x"), "side=x"), (step, dict(size="full"), "full"), (kernels, dict(rows="A3,x"), "rows=x"),
    (kernels, dict(size="full"), "need a GPU"), (kernels, dict(size="x"), "one of full, tiny"),
    (kernels, dict(rounds=0), "at least 1")])
def test_wrong_settings_are_one_line(part, settings, complaint):
    with pytest.raises(Error, match=complaint):
        part.main(part.Settings(**{"device": "cpu"} | settings), [])


@pytest.mark.parametrize("args, says", [([], "error: which benchmark"), (["--help"], "python -m bench kernels"),
                                        (["step", "--help"], "repeats"), (["kernels", "--row=A3"], "rows")])
def test_the_command_line(args, says, capsys):
    from bench import __main__ as command
    try:
        with config.one_line_errors():
            command.main(args)
    except SystemExit as e:
        print(e)
    assert says in capsys.readouterr().out


FAKE = """#!/bin/sh
case "$*" in
  *get_device_name*) echo "NVIDIA Toy 9000" ;;
  *xdist*) exit 1 ;;
  *"-m pytest"*) echo "3 passed in $TRITON_CACHE_DIR"; echo "$*" >>"$CALLS" ;;
  *"bench tiles"*|*"bench profile"*) echo "$*" >>"$CALLS" ;;
  *"bench kernels"*) echo "$*" >>"$CALLS"
    for a; do case $a in --out=*) echo "# Kernels, now" >"${a#--out=}" ;; esac; done ;;
  *"bench step"*) echo "$*" >>"$CALLS"; echo "S1: half way"; exit 3 ;;
esac
"""


def test_the_gpu_script_keeps_partial_results(tmp_path):
    """With a fake python3: six parts; one fails without a page. Peers come from a folder of wheels."""
    repo, out = tmp_path / "repo", tmp_path / "out"
    (repo / "bench").mkdir(parents=True), out.mkdir()
    (repo / "bench" / "gpu.sh").write_text((ROOT / "bench" / "gpu.sh").read_text())
    (tmp_path / "python3").write_text(FAKE)
    (tmp_path / "python3").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "OUT": str(out), "CALLS": str(tmp_path / "calls")}
    p = subprocess.run(["bash", repo / "bench" / "gpu.sh"], env=env, capture_output=True, text=True)
    assert p.returncode == 1 and "failed: Training steps" in p.stdout and p.stderr == ""
    parts = "tests", "large", "tiles", "profile", "steps", "kernels"
    assert {f.name for f in out.iterdir()} >= {f"{part}.{kind}" for part in parts for kind in ("txt", "md")}
    assert (out / "steps.txt").read_text() == "S1: half way\n"
    page, = (repo / "bench" / "results").iterdir()
    assert page.name.endswith("-toy-9000.md") and (out / page.name).read_text() == page.read_text()
    text = page.read_text()
    assert "3 passed in /tmp/pumice-triton-" in text and "# Kernels, now" in text
    assert "S1: half way" in text and "exit code 3" in text
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("timeout" in c for c in calls) == 0 and len(calls) == 6
    seconds = [int(w) for line in (ROOT / "bench" / "gpu.sh").read_text().splitlines() if line.startswith("part ")
               for w in [line.split('"')[2].split()[1]]]
    assert len(seconds) == 6 and sum(seconds) <= 520                  # and half a minute to start, of ten minutes
    for call, part, most in zip(calls[2:], (tiles, profile, step, kernels), seconds[2:]):     # its settings exist
        s = parse(part.Settings, call.split()[3:])
        assert s.seconds < most and all(n in {*rows.ROWS, *step.NAMES["cuda"]} for n in s.rows.split(","))


def test_the_gpu_script_keeps_earlier_pages(tmp_path):
    """A second run of the same day has its own page, and one that is late gives each part what is left of 560 s."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "gpu.sh").write_text((ROOT / "bench" / "gpu.sh").read_text())
    (tmp_path / "python3").write_text(FAKE)
    (tmp_path / "python3").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(tmp_path / "calls")}
    pages = []
    for began in (0, 400, 900):                                       # bash begins to count at $SECONDS
        p = subprocess.run(["bash", tmp_path / "bench" / "gpu.sh"], env=env | {"SECONDS": str(began)},
                           capture_output=True, text=True)
        most = [int(n) for n in re.findall(r": at most (\d+) s", p.stdout)]
        assert len(most) == 6 and sum(most) == 515 if not began else max(most) <= max(1, 560 - began)
        assert all(name.read_text() == text for name, text in pages)
        pages = [(f, f.read_text()) for f in sorted((tmp_path / "bench" / "results").iterdir())]
    assert [f.name[10:] for f, _ in pages] == ["-toy-9000-2.md", "-toy-9000-3.md", "-toy-9000.md"]


def test_the_gpu_script_reads_wheels_of_peers(tmp_path):
    """In a rehearsal on a CPU, with a fake python3, whose module zipfile is the real one"""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "peer-1.0-py3-none-any.whl", "w") as f:
        f.writestr("peer/__init__.py", "")
    real = f'case "$*" in *zipfile*) exec {sys.executable} "$@" ;; esac'
    (tmp_path / "python3").write_text(FAKE.replace("case", f"{real}\necho $PYTHONPATH >>$CALLS\ncase", 1))
    (tmp_path / "python3").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "OUT": str(tmp_path / "out"), "CALLS": str(tmp_path / "calls"),
           "PEERS": str(wheels)}
    p = subprocess.run(["bash", ROOT / "bench" / "gpu.sh", "--dry"], env=env, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text()
    assert p.stderr == "" and f"{tmp_path}/out/peers" in calls and (tmp_path / "out/peers/peer/__init__.py").is_file()
    assert calls.count("--device=cpu") == 4 and (tmp_path / "out").joinpath("kernels.md").is_file()
    assert not [*(ROOT / "bench/results").glob("*-dry.md")]


def test_each_tile_is_timed_and_restored(monkeypatch, capsys, tmp_path):
    """On a CPU, where tiles mean nothing. A tile that fails, or changes the result, is listed with its reason."""
    key = tiles.module.architecture(torch.empty(0)), 128
    before = {k: dict(v) for k, v in tiles.module.ATTENTION_TILES.items()}
    real, bad = tiles.contender, tiles.CANDIDATES["backward_q", 128][1]

    def contender(*args):
        c, D = real(*args)
        forward = c.forward

        def checked():
            if tiles.module.ATTENTION_TILES[key]["backward_q"] == bad:
                raise RuntimeError("out of resource: shared memory")
            wrong = tiles.module.ATTENTION_TILES[key]["forward"] == (64, 64, 4, 3)
            return tuple(1.1 * t for t in forward()) if wrong else forward()
        c.forward = checked
        return c, D
    monkeypatch.setattr(tiles, "contender", contender)
    page = tmp_path / "page"
    tiles.main(tiles.Settings(rows="A3", size="tiny", device="cpu", ms=0.1, processes=0, out=str(page)), [])
    found = json.loads(capsys.readouterr().out.splitlines()[-1], **JSON)["rows"]
    assert len(found) == 5 + 3 + 4 and tiles.module.ATTENTION_TILES == before
    failed = {(r["kernel"], tuple(r["tile"])): r["failed"] for r in found if r["failed"]}
    assert failed.pop(("backward_q", bad)) == "RuntimeError: out of resource: shared memory"
    assert failed.pop(("forward", (64, 64, 4, 3))).startswith("another result") and not failed
    assert all((r["ms"] or 0) > 0 for r in found if not r["failed"])
    assert "| A3 | forward | 128, 128, 8, 3 |" in page.read_text()


def test_a_failed_tile_does_not_stay(monkeypatch):
    """A process tries many tiles, of all three kernels"""
    before = {k: dict(v) for k, v in tiles.module.ATTENTION_TILES.items()}
    for run, why in ((lambda: 1 / 0, "ZeroDivisionError: division by zero"), (lambda: None, None)):
        monkeypatch.setattr(tiles, "contender", lambda *_: (types.SimpleNamespace(run=run), 128))
        assert tiles.try_tile("A3", "tiny", "cpu", "forward", 128, (64, 64, 4, 3)) == why
        assert tiles.module.ATTENTION_TILES == before


def test_a_profile_accounts_for_a_step():
    """Sums of gradients are counted in bytes: 12 for each trained weight and packed sequence but the first. The shares
    of the groups make a whole."""
    r = profile.measure("S1", "tiny", "cpu", 0)
    trained = sum(p.numel() for p in VLM(systems.system("S1", "tiny").cfg).multi_modal_projector.parameters())
    assert len(r["streams"]) > 1 and r["sums"] >= 12 * trained * (len(r["streams"]) - 1)
    assert {"products", "attention", "norms"} <= {*r["groups"]} and len(r["longest"]) == 10
    page = "\n".join(profile.lines(r))
    assert "S1, sequences of" in page and "TFLOP/s" in page
    groups = [line for line in page.splitlines() if line.startswith("| ") and "`" not in line][2:]
    shares = [float(line.split("|")[3].strip(" %")) for line in groups]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))
    names = "_forward", "norm_forward", "swiglu_backward", "_backward_kv", "_logits_to_gradient", "nvjet_tst_128x64"
    assert [profile.group_of(name) for name in names] == ["attention", "norms", "SwiGLU", "attention", "cross-entropy",
                                                          "products"]


def test_tests_use_the_given_triton_cache(tmp_path, tmp_path_factory, monkeypatch):
    """In gpu.sh the benchmarks find there what the tests have compiled."""
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    conftest.nothing_compiled_before.__wrapped__(tmp_path_factory)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)


def test_the_gpu_script_needs_a_gpu(tmp_path):
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1")
    (tmp_path / "python3").chmod(0o755)
    p = subprocess.run(["bash", ROOT / "bench" / "gpu.sh"], capture_output=True, text=True,
                       env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert p.returncode == 1 and p.stdout.splitlines()[-1] == "no GPU that torch can use"

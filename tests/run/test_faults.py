"""A run that is killed, stopped or out of disk ends, once started again, with the bits of an uninterrupted one. Dropout
and shuffling are on, and a checkpoint is written after every step, so that kills hit writes."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback

import pytest
import test_checkpoint
import torch
from conftest import FOREVER, ROOT, error, fork
from tiny_runs import LORA, SCRIPTS, files, rows, run

from formats import whole
from generate import Chat
from run import checkpoint, folder, log, publish

STEPS = 8
CLOCKED = {"tokens_per_s", "samples_per_s", "memory", "data_wait_s", "eta", "mfu"}


@pytest.fixture(scope="module")
def settings(validated):
    """Questions are answered with two tokens: answers would take most of the time. The revision of the code, which
    stands in cards, may change while the tests run."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(folder, "versions", dict)
        answers = Chat.answers
        m.setattr(Chat, "answers", lambda self, prompts, pixels: answers(self, prompts, pixels, 2))
        yield {**validated, **LORA, "steps": STEPS, "save_every": 1}


def life(settings, out, signalled=None, name=signal.SIGTERM, times=2, killed=None, syncs=None):
    """Fork a trainer that also notes which samples each step saw -> pid

    It gets a signal some times in step `signalled`, as do its loaders. It is killed after `killed` seconds of its own
    CPU time, wherever it is then, or at sync number `syncs` of what it writes: neither depends on how busy the machine
    is."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        os.setpgrp()
        os.makedirs(out, exist_ok=True)
        sys.stdout = sys.stderr = open(out / "said.txt", "a")
        count = log.Log.count

        def noting(self, step, batch, result):
            with open(out / "seen.txt", "a") as f:
                f.write(json.dumps([step, batch.names]) + "\n")
            if step == signalled:                      # schedulers repeat themselves, and signal the loaders too
                for _ in range(times):
                    os.killpg(os.getpgrp(), name)
                time.sleep(0.2)                        # a loader that the signal kills is dead by now
            count(self, step, batch, result)

        log.Log.count = noting
        if killed:                                     # the kernel's default for SIGPROF: as SIGKILL, no Python runs
            signal.setitimer(signal.ITIMER_PROF, killed)
        sync, done = whole.sync, itertools.count(1)

        def deadly(path):
            if half_written(out) and next(done) == syncs:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)
        whole.sync = deadly
        code = run("sft", settings, out) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def ended(pid):
    """-> exit code; a process that does not end fails the test"""
    end = time.monotonic() + FOREVER
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"still alive after {FOREVER} s")


def result(out):
    """Everything that must be alike in the end: bits of the files, log without clocks, samples by step."""
    bits = {k: v[0] for k, v in files(out).items() if k.startswith(("checkpoints/", "model/", "adapter/")) and
            "manifest" not in k and "state.json" not in k}
    log = [{k: v for k, v in r.items() if k not in CLOCKED} for r in rows(out / "log.jsonl")]
    seen = {}
    for line in (out / "seen.txt").read_text().splitlines():
        try:
            step, names = json.loads(line)
        except ValueError:
            continue                                   # the torn last line of a killed process
        assert seen.setdefault(step, names) == names, f"step {step} saw other samples after a restart"
    return bits, log, rows(out / "samples.jsonl"), seen


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    """The uninterrupted run -> its result, its seconds on a CPU"""
    def spent():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime
    out, before = tmp_path_factory.mktemp("undisturbed") / "run", spent()
    assert ended(life(settings, out)) == 0
    return result(out), spent() - before


def half_written(out):
    """Half-written things under a folder"""
    return [name for _, folders, files in os.walk(out) for name in folders + files if name.startswith((".tmp", ".old"))]


# ---- kill -9 --------------------------------------------------------------------------------------------------------

def test_killed_at_random_moments_it_ends_bit_equal(settings, undisturbed, tmp_path):
    truth, seconds = undisturbed
    rng, kills, in_writes, runs = random.Random(0), 0, 0, 0
    while kills < 6:
        out, code = tmp_path / f"{runs}" / "run", None
        while code != 0:
            ahead = {**settings, "workers": runs % 2}  # what a loader had prepared dies too
            how = {"syncs": rng.randrange(1, 40)} if kills % 2 == 0 else {"killed": rng.uniform(0.02, 0.6 * seconds)}
            code = ended(life(ahead, out, **how if kills < 6 else {}))
            assert code in (0, -signal.SIGKILL, -signal.SIGPROF), (out / "said.txt").read_text()
            kills += code != 0
            in_writes += bool(half_written(out))
        assert result(out) == truth
        assert not half_written(out)
        runs += 1
    print(f"{kills} kills, {in_writes} of them in a write, in {runs} runs")
    assert in_writes >= 3, "the harness does not test what it claims"


def test_killed_within_a_save_a_whole_checkpoint_remains(tmp_path, monkeypatch):
    """Before every fsync, rename, chmod, removal and file of a save that replaces, and retires, an older one"""
    out = tmp_path / "run"
    pair = test_checkpoint.trainer()
    test_checkpoint.train(*pair, [0])
    for step in (1, 2):
        test_checkpoint.save(out, step, pair)

    def child(folder, fatal):
        acts = [0]

        def deadly(act):
            def run(*args, **how):
                acts[0] += 1
                if acts[0] == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return act(*args, **how)
            return run
        for module, name in ((os, "fsync"), (os, "rename"), (os, "chmod"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"),
                             (checkpoint, "save_file"), (whole, "remove"), (whole, "file_digest")):
            setattr(module, name, deadly(getattr(module, name)))
        test_checkpoint.save(folder, 2, pair, keep_last=1)      # saves step 2 again, and removes step 1

    fatal, outcomes = 0, []
    while True:
        fatal += 1
        folder = tmp_path / f"{fatal}"
        shutil.copytree(out, folder)
        pid = os.fork()
        if not pid:
            try:
                child(folder, fatal)
            finally:
                os._exit(0)
        code = ended(pid)
        found = checkpoint.find_checkpoint(folder, "auto", pytest.fail)
        assert found and whole.whole(found) is None and not half_written(folder)
        outcomes.append(found.name)
        shutil.rmtree(folder)
        if code == 0:
            break
    assert fatal > 25 and outcomes[0] == outcomes[-1] == "step_0000002"


def test_a_kill_only_delays_a_checkpoint_removal(settings, undisturbed, tmp_path, monkeypatch):
    """After the last step there is nothing left to train and no checkpoint to write."""
    discard = checkpoint.discard
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "discard", lambda p: sys.exit("killed") if p.name == "step_0000006" else discard(p))
        with pytest.raises(SystemExit, match="killed"):
            run("sft", settings, tmp_path / "run")
    assert [n for n, _ in checkpoint.steps_in(tmp_path / "run")] == [6, 7, 8]
    run("sft", settings, tmp_path / "run")
    (tmp_path / "run" / "seen.txt").write_text("")
    assert result(tmp_path / "run")[:3] == undisturbed[0][:3]


def test_a_checkpoint_written_in_place_would_not_survive(tmp_path):
    pair = test_checkpoint.trainer()
    path = test_checkpoint.save(tmp_path, 1, pair)
    assert whole.whole(path) is None
    (path / "trained.safetensors").write_bytes((path / "trained.safetensors").read_bytes()[:-7])   # killed here
    assert "is damaged" in whole.whole(path)


# ---- signals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, times, workers, code", [
    (signal.SIGTERM, 2, 1, 143), (signal.SIGUSR1, 2, 0, 138), (signal.SIGINT, 1, 1, 130)])
def test_after_a_signal_the_same_command_resumes(name, times, workers, code, settings, undisturbed, tmp_path):
    out = tmp_path / "run"
    found = ended(life({**settings, "save_every": 100, "workers": workers}, out, 2, name, times))
    said = (out / "said.txt").read_text()
    assert found == code, said
    assert [n for n, _ in checkpoint.steps_in(out)] == [3] and not (out / "finished.json").exists()
    assert said.count("stopped by a signal after step 3/8; the same command goes on") == 1 and "Traceback" not in said
    assert ended(life(settings, out)) == 0
    assert result(out) == undisturbed[0]


def test_a_second_ctrl_c_ends_at_once(settings, tmp_path):
    out = tmp_path / "run"
    assert ended(life({**settings, "save_every": 100, "workers": 1}, out, 2, signal.SIGINT, 2)) == -signal.SIGINT
    assert not checkpoint.steps_in(out) and "Traceback" not in (out / "said.txt").read_text()


def test_ctrl_c_under_torchrun_saves(world, tmp_path):
    """As a terminal sends it: to all processes of the foreground group, which the ranks are not in."""
    out, how = tmp_path / "run", {**world, **LORA, "init": "", "steps": 100_000, "save_every": 0}
    args = [f"--{k}={v}" for k, v in {**how, "out": out}.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(tmp_path / "said.txt", "w") as said:
        job = subprocess.Popen([*launch, str(ROOT / "train_sft.py"), *args], stdout=said, stderr=said, cwd=tmp_path,
                               start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    end = time.monotonic() + FOREVER
    while not (out / "log.jsonl").is_file() and job.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(FOREVER) != 0
    said = (tmp_path / "said.txt").read_text()
    assert "stopped by a signal after step" in said and "the same command goes on" in said, said
    assert "KeyboardInterrupt" not in said, said
    (_, path), = checkpoint.steps_in(out)
    assert whole.whole(path) is None


def test_a_signal_to_one_rank_stops_both(settings, tmp_path):
    settings = {**settings, "val_data": "", "save_every": 100, "steps": 4, "parallel": "ddp"}

    def go(out, signalled=None):
        def rank(r):
            script, calls = SCRIPTS["sft"], []
            loss = script.token_loss

            def signalling(model, batch):
                calls.append(0)
                if r == 1 and len(calls) == signalled:
                    os.kill(os.getpid(), signal.SIGINT)
                return loss(model, batch)
            script.token_loss = signalling
            return run("sft", settings, out)
        out.parent.mkdir(exist_ok=True)
        return fork(2, rank, out.parent)

    assert go(tmp_path / "a" / "run") == [None, None]
    assert go(tmp_path / "b" / "run", 2) == [143, 130]
    (step, _), = checkpoint.steps_in(tmp_path / "b" / "run")
    assert 0 < step < 4
    (tmp_path / "b" / "store").unlink()
    assert go(tmp_path / "b" / "run") == [None, None]
    a, b = ({k: v[0] for k, v in files(tmp_path / x / "run" / "checkpoints" / "step_0000004").items()
             if k.endswith("safetensors")} for x in "ab")
    assert a == b


# ---- a full disk ----------------------------------------------------------------------------------------------------

def broken_saves(monkeypatch, bad):
    commit = whole.commit

    def full(folder, fill):
        if int(folder.name[5:]) in bad:
            raise OSError(f"{folder} could not be written: No space left on device (12 bytes free)")
        commit(folder, fill)
    monkeypatch.setattr(checkpoint, "commit", full)


def test_training_outlives_checkpoints_that_fail(settings, undisturbed, tmp_path, monkeypatch, capsys):
    broken_saves(monkeypatch, {2, 3, 5, 6})            # never three in a row
    run("sft", settings, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("No space left on device (12 bytes free); training goes on from memory") == 4
    (tmp_path / "run" / "seen.txt").write_text("")
    assert result(tmp_path / "run")[:3] == undisturbed[0][:3]


def test_three_failed_checkpoints_in_a_row_stop_it(settings, tmp_path, monkeypatch):
    """The last good one is there."""
    broken_saves(monkeypatch, {3, 4, 5})
    line = error(run, "sft", settings, tmp_path / "run")
    assert line.startswith("3 checkpoints in a row could not be written: ") and line.endswith("(12 bytes free)")
    assert "step_0000005" in line and checkpoint.find_checkpoint(tmp_path / "run", "auto").name == "step_0000002"


def test_a_failed_publish_succeeds_at_the_next_start(settings, undisturbed, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("model could not be written")
    with monkeypatch.context() as m:
        m.setattr(publish.llava, "save_model", full)
        line = error(run, "sft", settings, tmp_path / "run")
        assert line == "model could not be written. The last checkpoint is whole, the same command tries again"
    assert not (tmp_path / "run" / "finished.json").exists()
    run("sft", settings, tmp_path / "run")
    (tmp_path / "run" / "seen.txt").write_text("")
    assert result(tmp_path / "run")[0] == undisturbed[0][0]

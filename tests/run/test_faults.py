"""A run that is killed, told to stop or out of disk ends, once started again, with the bits of one that was left in
peace. Dropout and shuffling are on, and a checkpoint is written after every step, so that kills hit writes."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback

import pytest
import test_checkpoint
import torch
from conftest import FOREVER, fork
from test_stages import LORA, SCRIPTS, files, rows, run, signals, world  # noqa: F401  (fixtures)

from config import Error
from formats import whole
from run import checkpoint, stage

STEPS = 10
CLOCKED = {"tokens_per_s", "samples_per_s", "memory", "data_wait_s", "eta", "mfu"}


@pytest.fixture(scope="module")
def settings(world):  # noqa: F811
    return {**world, **LORA, "steps": STEPS, "save_every": 1, "eval_every": 4, "sample_every": 4}


def life(settings, out, told=None, name=signal.SIGTERM, killed=None, syncs=None):
    """Fork a trainer that also notes which samples each step saw, and hears a signal twice in step `told` -> pid

    It is killed after `killed` seconds of its own CPU time, wherever it is then, or at sync number `syncs` of what it
    writes: neither depends on how busy the machine is, as a murderer beside it would."""
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
        count = stage.Run.count

        def noting(self, step, batch, result, waited):
            with open(out / "seen.txt", "a") as f:
                f.write(json.dumps([step, batch.names]) + "\n")
            if step == told:                           # schedulers repeat themselves, and speak to the loaders too
                for _ in range(2):
                    os.system(f"kill -{int(name)} -{os.getpid()}")
                time.sleep(0.2)                        # a loader that dies of it has the time to
            count(self, step, batch, result, waited)

        stage.Run.count = noting
        if killed:                                     # the kernel's default for SIGPROF: as SIGKILL, no Python runs
            signal.setitimer(signal.ITIMER_PROF, killed)
        sync, done = whole.sync, itertools.count(1)

        def deadly(path):
            if litter(out) and next(done) == syncs:
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
    """-> exit code; a life that does not end fails the test"""
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
            continue                                   # the last words of a killed life
        assert seen.setdefault(step, names) == names, f"step {step} saw other samples in another life"
    return bits, log, rows(out / "samples.jsonl"), seen


@pytest.fixture(scope="module")
def peace(settings, tmp_path_factory):
    """The uninterrupted run -> its result, its seconds on a CPU"""
    def spent():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime
    out, before = tmp_path_factory.mktemp("peace") / "run", spent()
    assert ended(life(settings, out)) == 0
    return result(out), spent() - before


def litter(out):
    """Half-written things under a folder"""
    return [name for _, folders, files in os.walk(out) for name in folders + files if name.startswith((".tmp", ".old"))]


# ---- kill -9 --------------------------------------------------------------------------------------------------------

def test_killed_at_twenty_random_moments_and_started_again_it_ends_with_the_same_bits(settings, peace, tmp_path):
    truth, seconds = peace
    rng, kills, in_writes, runs = random.Random(0), 0, 0, 0
    while kills < 20:
        out, code = tmp_path / f"{runs}" / "run", None
        while code != 0:
            ahead = {**settings, "workers": runs % 2}  # what a worker had prepared and nobody has seen dies too
            how = {"syncs": rng.randrange(1, 50)} if kills % 3 == 0 else {"killed": rng.uniform(0.02, 0.6 * seconds)}
            code = ended(life(ahead, out, **how if kills < 20 else {}))
            assert code in (0, -signal.SIGKILL, -signal.SIGPROF), (out / "said.txt").read_text()
            kills += code != 0
            in_writes += bool(litter(out))
        assert result(out) == truth
        assert not litter(out)
        runs += 1
    print(f"{kills} kills, {in_writes} of them in a write, in {runs} runs")
    assert in_writes >= 7, "the harness does not test what it claims"


def test_killed_before_any_single_act_of_saving_an_old_or_the_new_checkpoint_is_whole(tmp_path, monkeypatch):
    """Every fsync, rename, chmod, removal and file of a save that replaces, and retires, an older one."""
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
                             (checkpoint, "save_file"), (whole, "remove"), (whole, "digest")):
            setattr(module, name, deadly(getattr(module, name)))
        test_checkpoint.save(folder, 2, pair, keep_last=1)      # the same step once more, and step 1 goes

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
        assert found and whole.whole(found) is None and not litter(folder)
        outcomes.append(found.name)
        shutil.rmtree(folder)
        if code == 0:
            break
    assert fatal > 25 and outcomes[0] == outcomes[-1] == "step_0000002"


def test_killed_after_its_last_checkpoint_and_before_an_older_one_went_it_goes_with_the_next_life(settings, peace,
                                                                                                  tmp_path, monkeypatch):
    """There is no step left to take then, and no checkpoint to write."""
    discard = checkpoint.discard
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "discard", lambda p: sys.exit("killed") if p.name == "step_0000008" else discard(p))
        with pytest.raises(Error, match="killed"):
            run("sft", settings, tmp_path / "run")
    assert [n for n, _ in checkpoint.steps_in(tmp_path / "run")] == [8, 9, 10]
    run("sft", settings, tmp_path / "run")
    (tmp_path / "run" / "seen.txt").write_text("")
    assert result(tmp_path / "run")[:3] == peace[0][:3]


def test_a_checkpoint_written_in_place_would_not_survive(tmp_path):
    pair = test_checkpoint.trainer()
    path = test_checkpoint.save(tmp_path, 1, pair)
    assert whole.whole(path) is None
    (path / "trained.safetensors").write_bytes((path / "trained.safetensors").read_bytes()[:-7])   # killed here
    assert "is damaged" in whole.whole(path)


# ---- told to stop ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, workers", [(signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGUSR1, 1)])
def test_told_to_stop_it_saves_the_step_it_is_in_once_and_goes_on_bit_by_bit(name, workers, settings, peace, tmp_path):
    out = tmp_path / "run"
    code = ended(life({**settings, "save_every": 100, "workers": workers}, out, 2, name))
    assert code == 143, (out / "said.txt").read_text()
    assert [n for n, _ in checkpoint.steps_in(out)] == [3] and not (out / "finished.json").exists()
    said = (out / "said.txt").read_text()
    assert said.count("stopped by a signal after step 3/10") == 1 and "Traceback" not in said
    assert ended(life(settings, out)) == 0
    assert result(out) == peace[0]


def test_when_one_of_two_ranks_is_told_both_stop_at_the_same_step(settings, tmp_path):
    settings = {**settings, "save_every": 100, "steps": 5, "parallel": "ddp"}

    def go(out, told=None):
        def rank(r):
            script, calls = SCRIPTS["sft"], []
            loss = script.token_loss

            def telling(model, batch):
                calls.append(0)
                if r == 1 and len(calls) == told:
                    os.kill(os.getpid(), signal.SIGTERM)
                return loss(model, batch)
            script.token_loss = telling
            return run("sft", settings, out)
        out.parent.mkdir(exist_ok=True)
        return fork(2, rank, out.parent)

    assert go(tmp_path / "a" / "run") == [None, None]
    assert go(tmp_path / "b" / "run", told=3) == [143, 143]
    (step, _), = checkpoint.steps_in(tmp_path / "b" / "run")
    assert 1 < step < 5
    (tmp_path / "b" / "store").unlink()
    assert go(tmp_path / "b" / "run") == [None, None]
    a, b = ({k: v[0] for k, v in files(tmp_path / x / "run" / "checkpoints" / "step_0000005").items()
             if k.endswith("safetensors")} for x in "ab")
    assert a == b


# ---- a full disk ----------------------------------------------------------------------------------------------------

def broken_saves(monkeypatch, bad):
    commit = whole.commit

    def full(folder, fill):
        if "step_" in folder.name and int(folder.name[5:]) in bad:
            raise OSError(f"{folder} could not be written: No space left on device (12 bytes free)")
        commit(folder, fill)
    monkeypatch.setattr(whole, "commit", full)


def test_a_checkpoint_that_cannot_be_written_is_reported_and_training_goes_on(settings, peace, tmp_path, monkeypatch,
                                                                              capsys):
    broken_saves(monkeypatch, {2, 3, 5, 6})            # never three in a row
    run("sft", settings, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("No space left on device (12 bytes free); training goes on from memory") == 4
    (tmp_path / "run" / "seen.txt").write_text("")
    assert result(tmp_path / "run")[:3] == peace[0][:3]


def test_three_in_a_row_stop_the_run_and_the_last_good_one_is_there(settings, tmp_path, monkeypatch):
    broken_saves(monkeypatch, {3, 4, 5})
    with pytest.raises(Error, match=r"3 checkpoints in a row could not be written: .*step_0000005.*12 bytes free"):
        run("sft", settings, tmp_path / "run")
    assert checkpoint.find_checkpoint(tmp_path / "run", "auto").name == "step_0000002"


def test_a_model_that_cannot_be_published_is_published_by_the_next_start(settings, peace, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(stage.hf, "save", lambda *a: (_ for _ in ()).throw(OSError("model could not be written")))
        with pytest.raises(Error, match="model could not be written. The last checkpoint is whole"):
            run("sft", settings, tmp_path / "run")
    assert not (tmp_path / "run" / "finished.json").exists()
    run("sft", settings, tmp_path / "run")
    (tmp_path / "run" / "seen.txt").write_text("")
    assert result(tmp_path / "run")[0] == peace[0][0]

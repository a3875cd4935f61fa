"""A checkpoint is whole or absent, whatever happens to the disk, and puts everything back by name."""

import json
import os
import random
import resource
import shutil

import pytest
import torch
from conftest import error, example, fork, tiny_vlm, train_step
from conftest import cpu_world as world
from safetensors.torch import load_file, save_file

import engine
from config import Error
from data import pack
from formats import whole
from loss import token_loss
from run import checkpoint

TABLE = {"multi_modal_projector.*": 1e-2}
FILES = ["trained.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"]


def trainer(w=None, wrap="ddp", table=TABLE, seed=0, lr=1.0):
    """-> model, optimizer of a tiny run"""
    w, model = w or world(), tiny_vlm(seed)
    lrs = {n: lr * v for n, v in engine.choose(model, table, torch.float64).items()}
    model = engine.parallelize(model, w, [*model.language_model.model.layers], wrap)
    return model, engine.adamw(model, lrs, 0.1)


def train(model, optimizer, steps, w=None, stop=6):
    """-> loss of each step; two samples in each, divided over the ranks"""
    w, losses = w or world(), []
    for step in steps:
        engine.set_lr(optimizer, step, stop, 2 / 6)
        mine = [pack([example(2 * step + i, images=1 - i)], 8) for i in range(2) if i % w.size == w.rank]
        losses.append(train_step(model, optimizer, mine, token_loss, w, 1.0)["loss"])
    return losses


def save(out, step, pair, w=None, keep_last=2):
    w = w or world()
    checkpoint.save_checkpoint(out, step, *pair, w, {"settings": {}, "note": "kept"})
    if w.rank == 0:
        checkpoint.retire(out, step, keep_last)
    return out / f"checkpoints/step_{step:07}"


def bits(pair):
    """All trained weights and moments, by name."""
    model, optimizer = pair
    named = {n: p for n, p in engine.unwrap(model).named_parameters() if p.requires_grad}
    out = {n: p.detach().clone() for n, p in named.items()}
    return out | {f"{n}.{k}": v.clone() for n, p in named.items() for k, v in optimizer.state[p].items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints of steps 1 and 2."""
    out, pair = tmp_path_factory.mktemp("run"), trainer()
    for step in range(2):
        train(*pair, [step])
        save(out, step + 1, pair)
    return out


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def step(n, out):
    return out / f"checkpoints/step_{n:07}"


# ---- whole or absent ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_makes_the_one_before_used(name, run):
    """Cut off anywhere, or with any bit flipped"""
    file, rng = step(2, run) / name, random.Random(name)
    good = file.read_bytes()
    cuts = {0, 1, len(good) - 1, *(rng.randrange(len(good)) for _ in range(37))}
    for cut in cuts:
        file.write_bytes(good[:cut])
        assert whole.whole(step(2, run)), f"cut at {cut}"
    flips = [(rng.randrange(len(good)), rng.randrange(8)) for _ in range(100)]
    for at, bit in flips:
        file.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1:])
        assert whole.whole(step(2, run)), f"bit {bit} of byte {at} flipped"
    said = []
    assert checkpoint.find_checkpoint(run, "auto", said.append) == step(1, run)
    assert len(said) == 1 and "step 2 is not used" in said[0] and str(step(2, run)) in said[0]
    file.write_bytes(good)
    assert checkpoint.find_checkpoint(run, "auto", said.append) == step(2, run)
    file.unlink()
    assert checkpoint.find_checkpoint(run, "auto", said.append) == step(1, run)


def test_a_manifest_must_be_exactly_what_was_written(run):
    file = step(2, run) / "manifest.json"
    for text in ("{}", "[]", "null", '"step"', "1", file.read_text().replace("\n", "\t", 1), file.read_text() + "\n"):
        file.write_text(text)
        assert whole.whole(step(2, run))


def test_the_newest_is_found_by_number_among_junk(saved, tmp_path, run):
    folder = run / "checkpoints"
    for n in (9, 10, 100, 99):                         # as text, step_9 and step_99 come last
        shutil.copytree(step(2, saved), folder / f"step_{n}")
    for junk in ("step_", "step_x", "step_0000200.bak", "best", "step_-5", "step_300x"):
        (folder / junk).mkdir()
    (folder / "step_0000400").write_text("a file")
    (folder / "step_0000500").mkdir()
    (folder / "notes.txt").write_text("mine")
    said = []
    assert checkpoint.find_checkpoint(run, "auto", said.append) == folder / "step_100"
    assert len(said) == 2 and "step 500" in said[0] and "step 400" in said[1]
    assert (folder / "notes.txt").exists() and (folder / "best").exists()


def test_a_run_without_a_whole_checkpoint_stops(run, tmp_path):
    for n in (1, 2):
        (step(n, run) / "state.json").write_text("{}")
    with pytest.raises(Error, match="is whole; --resume=none starts again"):
        checkpoint.find_checkpoint(run, "auto", lambda s: None)
    assert checkpoint.find_checkpoint(run, "none") is None
    assert checkpoint.find_checkpoint(tmp_path / "new", "auto") is None
    with pytest.raises(Error, match="state.json is damaged"):
        checkpoint.find_checkpoint(run, str(step(1, run)))


def test_retention_never_deletes_the_last_whole_one(tmp_path):
    pair = trainer()
    train(*pair, [0])
    for n in (1, 2, 3, 4):
        save(tmp_path, n, pair, keep_last=2)
    assert [n for n, _ in checkpoint.steps_in(tmp_path)] == [3, 4]
    for n in (3, 4):                                   # both are damaged: the run goes on from an older one
        (step(n, tmp_path) / "trained.safetensors").write_bytes(b"")
    save(tmp_path, 2, pair, keep_last=1)
    assert [n for n, _ in checkpoint.steps_in(tmp_path)] == [2], "3 and 4 are newer by number, and broken"
    assert whole.whole(step(2, tmp_path)) is None


def test_a_sweep_removes_what_was_half_written(run):
    """It brings back what was moved aside, and touches nothing else."""
    folder = run / "checkpoints"
    shutil.copytree(step(2, run), folder / ".tmp-step_0000003")
    (folder / ".tmp-step_0000003" / "manifest.json").unlink()
    (run / ".tmp-finished").write_text("{")
    (run / ".tmp-model").mkdir()
    os.rename(step(2, run), folder / ".old-step_0000002")
    shutil.copytree(step(1, run), folder / ".old-step_0000001")
    (folder / ".old-step_0000007").mkdir()
    (folder / ".hidden").write_text("mine")
    assert checkpoint.find_checkpoint(run, "auto") == step(2, run)
    assert {p.name for p in folder.iterdir()} == {"step_0000001", "step_0000002", ".hidden"}
    assert {p.name for p in run.iterdir()} == {"checkpoints"}


def test_files_have_the_mode_that_umask_gives(tmp_path):
    pair = trainer()
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        old = os.umask(mask)
        try:
            path = save(tmp_path, 1, pair)
        finally:
            os.umask(old)
        assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {mode}


def test_files_and_folder_are_synced_before_the_rename(tmp_path, monkeypatch):
    trace, fsync, rename = [], os.fsync, os.rename

    def note(fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        trace.append(("sync", os.path.basename(path), sorted(os.listdir(path)) if os.path.isdir(path) else None))
        fsync(fd)

    def move(a, b):
        trace.append(("rename", os.path.basename(a), os.path.basename(b)))
        rename(a, b)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", move)
    save(tmp_path, 1, trainer())
    assert {t[1] for t in trace[:4]} == set(FILES) - {"manifest.json"}
    assert trace[4:] == [("sync", "manifest.json", None), ("sync", ".tmp-step_0000001", sorted(FILES)),
                         ("rename", ".tmp-step_0000001", "step_0000001"), ("sync", "checkpoints", ["step_0000001"])]


# ---- a full disk ----------------------------------------------------------------------------------------------------

def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """At any point, without a trace; the message says where and how much is free."""
    pair = trainer(table={"*": 1e-3})
    train(*pair, [0])
    size = max(p.stat().st_size for p in save(tmp_path / "size", 1, pair).iterdir())
    out = tmp_path / "run"
    save(out, 1, pair)

    def child(rank):
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        said = []
        for i in range(10):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size * i // 10, resource.RLIM_INFINITY))
            try:
                save(out, 2, pair)
                said.append("written")
            except OSError as e:
                said.append(str(e))
            found = sorted(p.name for p in (out / "checkpoints").iterdir())
            assert found == ["step_0000001"] and whole.whole(step(1, out)) is None, (i, found)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        save(out, 2, pair)
        return said

    said, = fork(1, child, tmp_path)
    assert all("step_0000002 could not be written: " in s and s.endswith(" bytes free)") for s in said), said
    assert any("File too large" in s for s in said)
    assert checkpoint.find_checkpoint(out, "auto") == step(2, out)


# ---- everything comes back, by name ---------------------------------------------------------------------------------

def test_weights_moments_and_random_state_come_back(saved):
    pair = trainer()
    train(*pair, [0, 1])
    other = trainer(seed=7)
    torch.manual_seed(99)
    checkpoint.restore(step(2, saved), *other, world())
    assert same(bits(pair), bits(other))
    state = json.loads((step(2, saved) / "state.json").read_text())
    assert state["step"] == 2 and state["note"] == "kept" and state["world"] == 1
    assert torch.equal(torch.get_rng_state(), load_file(step(2, saved) / "rng.safetensors")["0.cpu"])


def test_another_order_of_creation_swaps_no_tensors(saved):
    pair = trainer()
    train(*pair, [0, 1])
    model = tiny_vlm(7)
    connector = model.multi_modal_projector
    for part in (connector, connector.linear_2):       # linear_2 first, and its bias before its weight
        kept = dict(reversed([*part._modules.items(), *part._parameters.items()]))
        for name, x in kept.items():
            delattr(part, name)
        for name, x in kept.items():
            setattr(part, name, x)
    optimizer = engine.adamw(model, engine.choose(model, TABLE, torch.float64), 0.1)
    assert optimizer.param_groups[0]["names"][0].startswith("multi_modal_projector.linear_2")
    checkpoint.restore(step(2, saved), model, optimizer, world())
    assert same(bits(pair), bits((model, optimizer)))


def test_tied_embeddings_are_one_tensor_before_and_after(tmp_path):
    def tied(seed):
        model = tiny_vlm(seed, tie_word_embeddings=True)
        return model, engine.adamw(model, engine.choose(model, {"language_model.*": 1e-2}, torch.float64), 0.1)
    pair, other = tied(0), tied(0)
    train(*pair, [0])
    path = save(tmp_path, 1, pair)
    assert [n for n in load_file(path / "trained.safetensors") if "embed" in n or "head" in n] == [
        "language_model.model.embed_tokens.weight"]
    checkpoint.restore(path, *other, world())
    assert same(bits(pair), bits(other))
    language = other[0].language_model
    assert language.head_weight is language.model.embed_tokens.weight
    assert train(*pair, [1]) == train(*other, [1]) and same(bits(pair), bits(other))


HARMS = {"lost": lambda t, n: t.pop(n), "added": lambda t, n: t.update({f"more.{n}": torch.zeros(1)}),
         "shorter": lambda t, n: t.update({n: t[n][:-1].clone()}),
         "narrower": lambda t, n: t.update({n: t[n].bfloat16()})}


@pytest.mark.parametrize("file, name", [("trained", "multi_modal_projector.linear_1.weight"),
                                        ("optimizer", "multi_modal_projector.linear_1.weight.exp_avg")])
@pytest.mark.parametrize("harm", HARMS)
def test_a_missing_unexpected_or_misshapen_tensor_is_named(file, name, harm, run):
    path = step(2, run) / f"{file}.safetensors"
    tensors = load_file(path)
    HARMS[harm](tensors, name)
    save_file(tensors, path)
    line = error(checkpoint.restore, step(2, run), *trainer(), world())
    assert name in line and str(step(2, run)) in line


def test_another_set_of_trained_tensors_is_refused(saved):
    for table, words in (({"multi_modal_projector.linear_1.*": 1e-2}, "linear_2.bias is not trained now but in"),
                         ({**TABLE, "language_model.lm_head.*": 1e-2}, "lm_head.weight is trained now but not in")):
        with pytest.raises(Error, match=words):
            checkpoint.restore(step(2, saved), *trainer(table=table), world())


def test_a_checkpoint_before_the_first_update_resumes(tmp_path):
    pair, other = trainer(), trainer()
    torch.nn.init.zeros_(other[0].multi_modal_projector.linear_1.weight)
    checkpoint.restore(save(tmp_path, 0, pair), *other, world())
    assert same(bits(pair), bits(other)) and train(*pair, [0, 1]) == train(*other, [0, 1])


def test_new_rates_take_effect_on_resume(saved):
    model, optimizer = trainer(lr=3.0)
    before = [(g["peak"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups]
    checkpoint.restore(step(2, saved), model, optimizer, world())
    assert [(g["peak"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups] == before
    assert engine.set_lr(optimizer, 2, 6, 2 / 6) == 3e-2


def test_any_layout_continues_any_other(tmp_path):
    """DDP, then one process, then FSDP, then DDP: each layout writes for another one and reads from another one. The
    losses and weights are those of an uninterrupted run."""
    pair = trainer(table={"*": 1e-2})
    truth = train(*pair, range(5))
    for i, (layout, size) in enumerate([("ddp", 2), ("auto", 1), ("fsdp", 2), ("ddp", 2)]):
        steps = range(2) if i == 0 else range(i + 1, i + 2)

        def rank(r):
            w = world(r, size)
            pair = trainer(w, layout, {"*": 1e-2})
            if i:
                checkpoint.restore(step(steps[0], tmp_path), *pair, w)
            losses = train(*pair, steps, w)
            save(tmp_path, steps[-1] + 1, pair, w)
            return losses
        (tmp_path / f"fork {i}").mkdir()
        found = fork(size, rank, tmp_path / f"fork {i}")
        assert all(losses == pytest.approx([truth[n] for n in steps], rel=1e-11) for losses in found), layout
    end, want = load_file(step(5, tmp_path) / "trained.safetensors"), dict(pair[0].named_parameters())
    # the bias of keys moves no softmax; Adam makes whole steps of its rounding
    compared = [k for k in end if not k.endswith("k_proj.bias")]
    assert max(((end[k] - want[k]).norm() / want[k].norm()).item() for k in compared) < 1e-9


def sgd(groups):
    return torch.optim.SGD(groups, momentum=0.9)


@pytest.mark.parametrize("make", [torch.optim.NAdam, sgd, torch.optim.Adagrad], ids=["NAdam", "SGD", "Adagrad"])
def test_another_optimizer_resumes_bit_by_bit(make, tmp_path):
    """One changed line in engine.adamw: what an optimizer keeps per parameter is its own business."""
    def other():
        model, optimizer = trainer()
        return model, make([{"params": g["params"], "lr": g["lr"], "peak": g["peak"]} for g in optimizer.param_groups])
    pair, again = other(), other()
    train(*pair, [0, 1])
    path = save(tmp_path, 2, pair)
    checkpoint.restore(path, *again, world())
    assert same(bits(pair), bits(again)) and len(bits(pair)) > 4
    assert train(*pair, [2, 3]) == train(*again, [2, 3]) and same(bits(pair), bits(again))
    line = error(checkpoint.restore, path, *trainer(), world())
    assert line.startswith(f"{path} was trained with {type(pair[1]).__name__}, not AdamW")


def test_two_ranks_continue_with_their_random_states(tmp_path):
    def rank(r):
        w = world(r, 2)
        pair = trainer(w)
        torch.manual_seed(r)
        train(*pair, range(2), w)
        save(tmp_path, 2, pair, w)
        noise = torch.rand(3).tolist()
        train(*pair, range(2, 4), w)
        other = trainer(w)
        torch.manual_seed(50)
        checkpoint.restore(step(2, tmp_path), *other, w)
        assert torch.rand(3).tolist() == noise
        train(*other, range(2, 4), w)
        assert same(bits(pair), bits(other))
        return noise
    a, b = fork(2, rank, tmp_path)
    assert a != b

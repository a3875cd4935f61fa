"""Contrastive pairs: the losses by their formulas; one gradient for any micro-batches and ranks; train_pairs.py."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, error, fork
from conftest import cpu_world as world
from safetensors.torch import load_file, save_file
from test_train import split
from tiny_runs import rows, state, write_data

import config
import engine
import train_align
import train_pairs
from data import pack
from formats.pairs import Words, load_pairs
from loss import clip_loss, siglip_loss
from parts import pairs
from run.pairs import METHODS, PairEncoder, begin_pairs, text_ends
from tools import retrieval

GATE = 1e-12
TINY = ("vision.hidden_size=32 vision.intermediate_size=48 vision.num_hidden_layers=2 vision.image_size=8 "
        "vision.patch_size=4 text.hidden_size=16 text.intermediate_size=24 text.num_hidden_layers=1 "
        "text.max_position_embeddings=16 width=32")


def vectors(n=6, E=5):
    torch.manual_seed(0)
    return *(F.normalize(torch.randn(n, E, dtype=torch.float64), dim=-1) for _ in range(2)), torch.tensor(
        [1.3, -0.7], dtype=torch.float64)


# ---- the losses -----------------------------------------------------------------------------------------------------

def test_clip_loss_is_symmetric_cross_entropy():
    x, y, scale = vectors()
    logits, own = scale[0].exp() * x @ y.T, torch.arange(6)
    true = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert abs(clip_loss(x, y, scale).mean() - true) < GATE
    assert abs(clip_loss(x, y, scale).mean() - clip_loss(y, x, scale).mean()) < GATE
    assert abs(clip_loss(x, y, scale).mean() - clip_loss(x, y.flip(0), scale).mean()) > 1e-3


def test_siglip_loss_is_equation_1():
    x, y, (t, b) = vectors()
    total = 0.0
    for i in range(6):
        for j in range(6):
            z = 1 if i == j else -1
            total += math.log(1 / (1 + math.exp(-z * (math.exp(t) * float(x[i] @ y[j]) + b))))
    assert abs(siglip_loss(x, y, torch.stack([t, b])).mean() + total / 6) < GATE


# ---- one step, cut in any way ---------------------------------------------------------------------------------------

def tiny(kind):
    model, folder = load_pairs(kind=kind, tokenizer=ROOT / "demo/llm", parts=TINY, seed=1)
    torch.manual_seed(2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.double(), folder


def batches(folder, cfg, groups):
    texts = ["red", "a blue star", "top left", "a sign that says 7", "left", "a cross and a star", "1", "large"]
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 1, 3, 8, 8), generator=g, dtype=torch.uint8)
    ids = [folder.words.encode(t) for t in texts]
    samples = [(i, [-100] * (len(i) - 1) + i[-1:], x) for i, x in zip(ids, images)]
    return [pack([samples[i] for i in group], 8, text_ends(cfg)) for group in groups]


def step(kind, groups, w, wrap=None):
    """The lines of the script's loop, without the update -> gradients by name, loss, accuracy"""
    model, folder = tiny(kind)
    lrs = engine.choose(model, {"*": 1e-2}, torch.float64)
    assert len(lrs) == len(list(model.parameters()))
    micro, model = batches(folder, model.cfg, groups), engine.parallelize(model, w, model.blocks, wrap)
    n, = w.sum([sum((b.labels >= 0).sum().item() for b in micro)])
    compared, accuracy = pairs.compare_pairs(model, micro, w, METHODS[kind][2], (0, 0))
    total = 0.0
    for b in compared:
        with engine.sync_gradients(model, enabled=b is compared[-1]):
            loss = pairs.pair_loss(model, b)
            (loss * w.size / n).backward()
        total += loss.item()
    engine.check_gradients(model)
    found = {k: engine.whole_tensor(p.grad).clone() for k, p in engine.unwrap(model).named_parameters()}
    return found, w.sum([total])[0] / n, float(accuracy)


def truth(kind):
    """The loss of all eight pairs by autograd alone"""
    model, folder = tiny(kind)
    b, = batches(folder, model.cfg, [range(8)])
    losses = METHODS[kind][2](*model(b))
    losses.mean().backward()
    return {k: p.grad for k, p in model.named_parameters()}, losses.mean().item()


def off(found, true):
    return max(((found[k] - true[k]).norm() / true[k].norm()).item() for k in true if not k.endswith("k_proj.bias"))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("groups", [[[*range(8)]], [[0, 1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)],
                                    [[7, 0], [], [3, 1, 6, 2, 5, 4]]])
def test_micro_batches_cut_anyhow_give_one_gradient(kind, groups):
    true, loss = truth(kind)
    found, mean, accuracy = step(kind, groups, world())
    assert off(found, true) < GATE and abs(mean / loss - 1) < GATE and 0 <= accuracy <= 1


@pytest.mark.parametrize("kind, wrap, groups", [
    ("clip", "ddp", [[[0, 5], [1, 2, 3, 4]], [[6, 7], []]]), ("siglip", "fsdp", [[[0, 5], [1, 2, 3, 4]], [[6, 7], []]]),
    ("siglip", "ddp", [[[0, 1, 2]], [[3, 4, 5, 6, 7]]]), ("clip", "fsdp", [[[0, 1, 2]], [[3, 4, 5, 6, 7]]])])
def test_two_ranks_give_the_gradient_of_one(kind, wrap, groups, tmp_path):
    def rank(r):
        found, *result = step(kind, groups[r], world(r, 2), wrap)
        save_file({k: v.contiguous() for k, v in found.items()}, tmp_path / f"g{r}.safetensors")
        return result
    true, loss = truth(kind)
    results = fork(2, rank, tmp_path)
    assert all(abs(mean / loss - 1) < GATE for mean, _ in results) and results[0] == results[1]
    for r in (0, 1):
        assert off(load_file(tmp_path / f"g{r}.safetensors"), true) < GATE


def test_pairs_of_one_micro_batch_alone_would_fail():
    """The classic mistake: each micro-batch is its own set of negatives"""
    model, folder = tiny("clip")
    for b in batches(folder, model.cfg, [[0, 1, 2, 3], [4, 5, 6, 7]]):
        (clip_loss(*model(b)).sum() / 8).backward()
    assert off({k: p.grad for k, p in model.named_parameters()}, truth("clip")[0]) > 1e-2


def test_logits_have_a_largest_scale():
    """CLIP's alone"""
    for kind, largest in (("clip", 100), ("siglip", math.exp(9))):
        model, _ = tiny(kind)
        torch.nn.init.constant_(model.logit_scale, 9.0)
        model.limit_scale()
        assert model.logit_scale.exp().item() == pytest.approx(largest, rel=1e-12)


def test_ties_count_as_errors():
    assert pairs.accuracy(torch.zeros(3, 3)) == 0 and pairs.accuracy(torch.eye(3)) == 1
    assert retrieval.recall(torch.zeros(3, 3), torch.eye(3, dtype=torch.bool)) == {1: 0, 5: 1, 10: 1}


# ---- the script -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """22 rows with one image each -> settings"""
    at = tmp_path_factory.mktemp("pairs")
    for name, n, seed in (("train.jsonl", 28, 0), ("val.jsonl", 8, 100)):
        file = write_data(at, name, n, seed)
        kept = [row for row in map(json.loads, file.read_text().splitlines()) if "image" in row]
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return dict(data=str(at / "train.jsonl"), images=str(at / "images"), val_data=str(at / "val.jsonl"), device="cpu",
                batch_size=8, max_tokens=40, steps=6, save_every=2, log_every=1, eval_every=3, parts=TINY)


def run(data, out, **changes):
    return train_pairs.main(train_pairs.Settings(**{**data, "out": str(out), **changes}))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_run_trains_and_publishes(kind, data, tmp_path):
    assert run(data, tmp_path / "run", kind=kind, lr=3e-3) is None
    lines = rows(tmp_path / "run/log.jsonl")
    logged = [r for r in lines if "loss" in r]
    assert len(logged) == 6 and {"accuracy", "grad_norm", "supervised_tokens"} <= set(logged[0])
    assert all(r["supervised_tokens"] == 8 for r in logged) and logged[-1]["loss"] < logged[0]["loss"]
    assert [r["step"] for r in lines if "val_loss" in r] == [3, 6] and "val_accuracy" in lines[-1]
    model, folder = load_pairs(tmp_path / "run")
    assert model.cfg.kind == kind and "zero-shot" in (tmp_path / "run/model/README.md").read_text()
    assert run(data, tmp_path / "run", kind=kind, lr=3e-3) is None, "a finished run is left alone"


def test_a_stopped_run_ends_with_the_same_bits(data, tmp_path):
    run(data, tmp_path / "one")
    run(data, tmp_path / "two", steps=6)
    assert state(tmp_path / "one") == state(tmp_path / "two")
    import shutil
    shutil.rmtree(tmp_path / "two/checkpoints/step_0000006")
    (tmp_path / "two/finished.json").unlink()
    run(data, tmp_path / "two")
    assert state(tmp_path / "one") == state(tmp_path / "two")


def test_two_processes_train_what_one_does(data, tmp_path):
    settings = {**data, "dtype": "fp64", "steps": 3, "save_every": 3}
    run(settings, tmp_path / "one")
    for parallel in ("ddp", "fsdp"):
        (tmp_path / parallel).mkdir()
        fork(2, lambda rank: run(settings, tmp_path / parallel / "run", parallel=parallel), tmp_path / parallel)
        one, two = (load_file(p / "checkpoints/step_0000003/trained.safetensors")
                    for p in (tmp_path / "one", tmp_path / parallel / "run"))
        assert off(two, one) < 1e-9
        for x, y in zip(*(rows(p / "log.jsonl") for p in (tmp_path / "one", tmp_path / parallel / "run")), strict=True):
            for key in ("loss", "val_loss", "grad_norm"):
                assert x.get(key, 0) == pytest.approx(y.get(key, 0), rel=1e-9)


def test_a_dry_run_shows_a_pair(data, tmp_path, capsys):
    assert run(data, tmp_path / "run", dry_run=True) is None
    assert "of 8 pairs" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, says", [
    (dict(llm="x"), "llm=x would not be read"), (dict(system=""), "would not be read"), (dict(kind="foo"), "kind=foo"),
    (dict(vision="nowhere"), "no such folder"), (dict(tokenizer="nowhere"), "no such folder"),
    (dict(init="nowhere"), "so parts="), (dict(init="nowhere", parts=""), "holds no model"),
    (dict(max_len=7), "max_len=7 would not be read"), (dict(sample_every=7), "would not be read"),
    (dict(image_aspect="pad"), "published with the model has crop"),
    (dict(kind="siglip", image_aspect="crop"), "published with the model has squash"),
    (dict(parts="text.foo=1"), "not a field=value"), (dict(kind="siglip", parts="width=99"), "width=99"),
    (dict(max_tokens=3), "one sample must fit into a stream")])
def test_a_contradiction_ends_in_one_line(changes, says, data, tmp_path):
    assert says in error(run, data, tmp_path / "run", **changes)


def test_rows_without_one_image_are_refused(data, tmp_path):
    row = json.loads(Path(data["data"]).read_text().splitlines()[0])
    encode = PairEncoder(load_pairs(kind="clip", tokenizer=ROOT / "demo/llm", parts=TINY)[1].words)
    ids, labels, names, cut = encode(row)
    assert labels == [-100] * (len(ids) - 1) + ids[-1:] and names == [row["image"]] and cut == 0
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a cat"}]
    for images in ([], ["a", "b"]):
        with pytest.raises(config.BadSample, match="one image and one caption"):
            encode({"image": images, "conversations": turns})
    for document in ({"text": "<image> a cat", "images": ["a"]}, {"text": "words"}):
        with pytest.raises(config.BadSample, match="one image and one caption"):
            encode(document)


def test_unusable_validation_pairs_are_counted(data, tmp_path):
    val = [json.loads(line) for line in Path(data["val_data"]).read_text().splitlines()]
    file = tmp_path / "val.jsonl"
    for bad in (2, len(val)):
        file.write_text("".join(json.dumps(r | ({"image": "no.png"} if i < bad else {})) + "\n"
                                for i, r in enumerate(val)))
        if bad == 2:
            run(data, tmp_path / "run", val_data=str(file), steps=1)
            assert rows(tmp_path / "run/log.jsonl")[-1]["val_dropped"] == 2
        for dry_run in (True, False) * (bad > 2):
            assert "no pair can be used; val.jsonl[" in error(run, data, tmp_path / "bad", val_data=str(file),
                                                                dry_run=dry_run)


def test_images_of_another_side_are_refused(data, tmp_path):
    """A tower would read their upper left corner alone."""
    run(data, tmp_path / "run", steps=1)
    file = tmp_path / "run/model/preprocessor_config.json"
    file.write_text(file.read_text().replace(": 8", ": 16"))
    for changes in (dict(init=str(tmp_path / "run/model"), parts=""), dict(vision=str(tmp_path / "run/model"))):
        assert "makes images of side 16, the tower reads 8" in error(run, data, tmp_path / "x", **changes)
    assert "of side 16" in error(retrieval.Towers, tmp_path / "run/model")


def test_a_siglip_that_says_nothing_is_squashed(data, tmp_path):
    """The published preprocessor_config.json of SigLIP has no do_center_crop: its images are squashed."""
    run(data, tmp_path / "run", kind="siglip", steps=1)
    file = tmp_path / "run/model/preprocessor_config.json"
    file.write_text(json.dumps({k: x for k, x in json.loads(file.read_text()).items() if k != "do_center_crop"}))
    s = train_pairs.Settings(**{**data, "init": str(tmp_path / "run/model"), "parts": "", "out": str(tmp_path / "x")})
    begin_pairs(s)
    assert s.image_aspect == "squash"


def test_captions_are_cut_and_counted():
    words = load_pairs(kind="clip", tokenizer=ROOT / "demo/llm", parts=TINY)[1].words
    text = "red circle " * 20
    ids = words.encode(text)
    assert isinstance(words, Words) and len(ids) == 16 and ids[-1] == words.encode("red")[-1] and words.lost(text) > 20


def test_the_loop_is_that_of_every_stage():
    """Five lines differ: what is counted, all pairs compared first, the loss, the scale, no answers to questions"""
    one, two = (split(Path(script.__file__).read_text())[0] for script in (train_align, train_pairs))
    one, two = ([line.strip() for line in lines] for lines in (one, two))
    assert len([line for line in two if line not in one]) <= 8 and len([line for line in one if line not in two]) <= 8


# ---- retrieval ------------------------------------------------------------------------------------------------------

def test_retrieval_and_classes(data, tmp_path, capsys):
    run(data, tmp_path / "run", steps=2)
    ask = dict(model=str(tmp_path / "run"), data=data["val_data"], images=data["images"])
    retrieval.main(retrieval.Settings(**ask))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["n"] == 6 and 0 <= found["image_to_text"]["1"] <= found["text_to_image"]["10"] <= 1
    assert found["image_to_text"]["10"] == 1
    file = tmp_path / "classes.jsonl"
    file.write_text("".join(json.dumps({"image": f"{i}.png", "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": ["black", "red", "white"][i % 3]}]}) + "\n"
        for i in (0, 1, 2)))
    ask["data"] = str(file)
    retrieval.main(retrieval.Settings(**ask, classes="black,red,white", templates="a {} cat|{}"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] in (0, 0.3333, 0.6667, 1)
    assert "none of the classes" in error(retrieval.main, retrieval.Settings(**ask, classes="black,red"))


def test_an_image_may_have_several_captions(data, tmp_path, capsys, monkeypatch):
    """As in COCO: an image is found by any of its captions, and a caption finds its image once."""
    run(data, tmp_path / "run", steps=1)
    names = [json.loads(line)["image"] for line in Path(data["val_data"]).read_text().splitlines()][:2]
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"image": name, "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"{caption} {i}"}]}) + "\n"
        for i, name in enumerate(names) for caption in ("red", "blue", "green")))
    monkeypatch.setattr(retrieval.Towers, "images", lambda self, paths: torch.eye(2)[: len(paths)])
    monkeypatch.setattr(retrieval.Towers, "texts", lambda self, texts: torch.tensor(
        [[0.9, 0.1], [0.1, 0.9], [0.8, 0.2], [0.1, 0.5], [0.2, 0.6], [0.3, 0.7]]))
    retrieval.main(retrieval.Settings(model=str(tmp_path / "run"), data=str(file), images=data["images"]))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["n"], found["captions"]) == (2, 6)
    assert found["image_to_text"]["1"] == 0.5 and found["text_to_image"] == {"1": round(5 / 6, 4), "5": 1, "10": 1}


def test_zero_shot_takes_the_nearest_mean(data, tmp_path, capsys, monkeypatch):
    """A class is the mean of its templates: either template alone misses the second image"""
    run(data, tmp_path / "run", steps=1)
    file, names = tmp_path / "classes.jsonl", ["red", "blue"]
    file.write_text("".join(json.dumps({"image": f"{i}.png", "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": name}]}) + "\n"
        for i, name in enumerate(names)))
    known = {"a red": [1, 0], "red": [1, 0], "a blue": [1, -1], "blue": [0, 1]}
    vectors = torch.tensor([[1, 0.1], [0.85, 0.5]])
    monkeypatch.setattr(retrieval.Towers, "images", lambda self, paths: F.normalize(vectors[: len(paths)]))
    monkeypatch.setattr(retrieval.Towers, "texts",
                        lambda self, texts: F.normalize(torch.tensor([known[t] for t in texts], dtype=torch.float32)))
    ask = dict(model=str(tmp_path / "run"), data=str(file), images=data["images"], classes="red,blue")
    for templates, right in (("a {}", 0.5), ("a {}|{}", 1), ("{}", 0.5)):
        retrieval.main(retrieval.Settings(**ask, templates=templates))
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] == right, templates


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_stage_1_takes_the_image_tower(kind, data, tmp_path):
    """train_align.py --vision=runs/pairs/model"""
    run(data, tmp_path / "run", kind=kind, steps=1)
    settings = {k: x for k, x in data.items() if k not in ("parts", "steps", "val_data", "batch_size", "max_tokens")}
    assert train_align.main(train_align.Settings(
        **settings, vision=str(tmp_path / "run/model"), steps=1, batch_size=4, max_len=60, max_tokens=120,
        out=str(tmp_path / "align"))) is None
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    tower, vlm = (load_file(tmp_path / place / "model/model.safetensors") for place in ("run", "align"))
    assert torch.equal(tower[name], vlm[f"vision_tower.{name}"])

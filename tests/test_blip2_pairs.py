"""BLIP-2's first stage: who sees whom under its three masks, its losses, one gradient for any cut, a run, a start."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, error, fork
from safetensors.torch import load_file, save_file
from test_train_pairs import batches, off, rows, state, world
from tiny_runs import write_data, write_whole_tower

import engine
import train_align
import train_pairs
from formats import llava
from formats.blip2_pairs import load_blip2, save_blip2
from parts import blip2
from run.arguments import parse
from tools import retrieval

GATE = 1e-12
SIZES = ("hidden_size=24", "num_hidden_layers=3", "num_attention_heads=3", "intermediate_size=40")
TINY = " ".join(["tokens=3 width=8 qformer.max_position_embeddings=20", *(f"qformer.{x}" for x in SIZES)])


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_whole_tower(tmp_path_factory.mktemp("blip2") / "vision")


@pytest.fixture
def tiny(tower):
    """A new model with larger weights, in float64, and its folder"""
    def make():
        model, folder = load_blip2(tokenizer=ROOT / "demo/llm", vision=tower, parts=TINY, seed=1)
        torch.manual_seed(3)
        for n, p in model.named_parameters():
            if not n.startswith("vision_tower.") and n != "temperature":
                torch.nn.init.normal_(p, mean=1.0 if "norm" in n and n.endswith("weight") else 0.0, std=0.3)
        return model.double(), folder
    return make


def pairs(folder, groups):
    from types import SimpleNamespace
    return batches(folder, SimpleNamespace(kind="blip2"), groups)


def test_new_captions_are_read_from_the_start(tower):
    """[CLS] reads its caption by self-attention alone, so in a new model that may not begin at 0"""
    model, folder = load_blip2(tokenizer=ROOT / "demo/llm", vision=tower, parts=TINY, seed=1)
    b, = pairs(folder, [[3, 5]])
    with torch.no_grad():
        text = model.encode_texts(blip2.texts_of(b))
    assert (text[0] - text[1]).abs().max() > 0.1


# ---- who sees whom --------------------------------------------------------------------------------------------------

def states(model, texts, image, **how):
    with torch.no_grad():
        return model.multi_modal_projector.states(model.normed(image), *texts, **how)


@pytest.fixture
def seen(tiny):
    """model, two captions, features of two images; the same with another fourth word in the first caption"""
    model, folder = tiny()
    b, = pairs(folder, [[3, 5]])
    texts, image = blip2.texts_of(b), model.features(b.images)
    other = blip2.Texts(texts.words.clone(), texts.counts)
    other.words[3] += 1
    assert texts.counts.tolist() == [int((b.lo == 0).sum()), len(b.ids) - int((b.lo == 0).sum())]
    return model, texts, other, image


def moved(a, b):
    return [(x != y).any(-1).tolist() for x, y in zip(a, b)]


def test_itg_words_see_earlier_words_alone(seen):
    """Word 3 of the first caption moves the words from itself on, no query, and nothing of the other pair"""
    model, texts, other, image = seen
    queries, words = moved(states(model, texts, image, causal=True), states(model, other, image, causal=True))
    n = texts.counts[0].item()
    assert not any(queries) and words == [False] * 3 + [True] * (n - 3) + [False] * texts.counts[1].item()


def test_itg_words_see_the_image(seen):
    model, texts, _, image = seen
    changed = image.clone()
    changed[1, 2] += 1
    queries, words = moved(states(model, texts, image, causal=True), states(model, texts, changed, causal=True))
    n = texts.counts[0].item()
    assert queries == [False] * 3 + [True] * 3 and words == [False] * n + [True] * texts.counts[1].item()


def test_itg_queries_are_those_of_queries_alone(seen):
    model, texts, _, image = seen
    none = torch.zeros(2, dtype=torch.long)
    alone = states(model, (none[:0], none), image)[0]
    assert (alone - states(model, texts, image, causal=True)[0]).abs().max() < GATE
    assert (alone - states(model, texts, image)[0]).abs().max() > 1e-3, "in ITM they see words"


def test_itm_all_see_all(seen):
    model, texts, other, image = seen
    queries, words = moved(states(model, texts, image), states(model, other, image))
    n = texts.counts[0].item()
    assert queries == [True] * 3 + [False] * 3 and words == [True] * n + [False] * texts.counts[1].item()


def test_itc_words_see_their_own_caption(seen):
    model, texts, other, image = seen
    a, b = (states(model, t, image[:, :0], queries=False) for t in (texts, other))
    n = texts.counts[0].item()
    assert len(a[0]) == 0 and moved(a, b)[1] == [True] * n + [False] * texts.counts[1].item()


# ---- losses ---------------------------------------------------------------------------------------------------------

def test_itc_takes_the_best_query():
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1) for shape in ((4, 3, 5), (4, 5)))
    t, own = torch.tensor([0.3], dtype=torch.float64), torch.arange(4)
    s = torch.stack([torch.stack([max(q @ y for q in x) for y in text]) for x in image]) / t
    true = sum(F.cross_entropy(z, own, label_smoothing=0.1) for z in (s, s.T)) / 2
    assert abs(blip2.itc_loss(image, text, t).mean() - true) < GATE


def test_wrong_pairs_are_drawn_by_similarity():
    similar = torch.tensor([[0.0, 9, 0], [0, 0, 9], [9, 0, 0]])
    texts, images = [], []
    for i in range(200):
        image_of_text, text_of_image = blip2.draw_wrong(similar, (0, i))
        images.append(image_of_text.tolist())
        texts.append(text_of_image.tolist())
    assert all(i != j for row in texts + images for i, j in enumerate(row)), "never the own one"
    assert texts.count([1, 2, 0]) > 190 and images.count([2, 0, 1]) > 190
    assert torch.equal(*(torch.stack(blip2.draw_wrong(torch.zeros(9, 9), (4, 7))) for _ in range(2)))


def test_the_loss_is_the_sum_of_three(tiny):
    """By hand, one pair after the other"""
    model, folder = tiny()
    b, = pairs(folder, [range(4)])
    (one,), _ = blip2.compare_blip2(model, [b], world(), blip2.itc_loss, (0, 1))
    with torch.no_grad():
        found = blip2.blip2_loss(model, one) / 4
        image, text, t, features = model(b)
        texts = blip2.texts_of(b)
        ids = texts.words.split(texts.counts.tolist())
        wrong_image, wrong_text = blip2.draw_wrong(blip2.similarities(image, text) / t, (0, 1))

        def single(words):
            return blip2.Texts(words, torch.tensor([len(words)]))
        itm = itg = n = 0
        for i in range(4):
            cases = [(i, i, 1), (int(wrong_image[i]), i, 0), (i, int(wrong_text[i]), 0)]
            itm += sum(F.cross_entropy(model.match(features[[x]], single(ids[y])), torch.tensor([right]))
                       for x, y, right in cases) / 3
            logits = model.word_logits(features[[i]], single(ids[i]))[:-1]
            itg += F.cross_entropy(logits, ids[i][1:], label_smoothing=0.1, reduction="sum")
            n += len(logits)
        true = blip2.itc_loss(image, text, t).mean() + itm / 4 + itg / n
    assert abs(found / true - 1) < GATE


# ---- one step, cut in any way ---------------------------------------------------------------------------------------

@pytest.fixture
def greedy(monkeypatch):
    """The most similar wrong one, whatever the order of the pairs"""
    def most(similar, draw):
        off_diagonal = [s - 99 * torch.eye(len(s), dtype=s.dtype) for s in (similar.T, similar)]
        return [s.argmax(1) for s in off_diagonal]
    monkeypatch.setattr(blip2, "draw_wrong", most)


def step(tiny, groups, w, wrap=None):
    model, folder = tiny()
    engine.choose(model, {"*": 1e-2, "vision_tower.*": 0.0, "*.post_layernorm.*": 1e-2}, torch.float64)
    micro, model = pairs(folder, groups), engine.parallelize(model, w, model.blocks, wrap)
    n, = w.sum([sum(len(b.images) for b in micro)])
    compared, _ = blip2.compare_blip2(model, micro, w, blip2.itc_loss, (0, 0))
    total = 0.0
    for b in compared:
        with engine.sync_gradients(model, enabled=b is compared[-1]):
            loss = blip2.blip2_loss(model, b)
            (loss * w.size / n).backward()
        total += loss.item()
    engine.check_gradients(model)
    found = {k: engine.whole_tensor(p.grad).clone() for k, p in engine.unwrap(model).named_parameters()
             if p.requires_grad}
    return found, w.sum([total])[0] / n


def test_micro_batches_cut_anyhow_give_one_gradient(tiny, greedy):
    true, loss = step(tiny, [[*range(8)]], world())
    for groups in ([[i] for i in range(8)], [[7, 0], [], [3, 1, 6, 2, 5, 4]]):
        found, mean = step(tiny, groups, world())
        assert off(found, true) < GATE and abs(mean / loss - 1) < GATE


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_two_ranks_give_the_gradient_of_one(wrap, tiny, greedy, tmp_path):
    groups = [[[0, 5], [1, 2, 3, 4]], [[6, 7], []]]

    def rank(r):
        found, mean = step(tiny, groups[r], world(r, 2), wrap)
        save_file({k: v.contiguous() for k, v in found.items()}, tmp_path / f"g{r}.safetensors")
        return mean
    true, loss = step(tiny, [[*range(8)]], world())
    assert all(abs(mean / loss - 1) < GATE for mean in fork(2, rank, tmp_path))
    for r in (0, 1):
        assert off(load_file(tmp_path / f"g{r}.safetensors"), true) < GATE


def test_the_gradient_is_that_of_autograd(tiny, greedy):
    """The first pass changes nothing: ITC of all pairs in one graph"""
    found, _ = step(tiny, [[*range(8)]], world())
    model, folder = tiny()
    engine.choose(model, {"*": 1e-2, "vision_tower.*": 0.0, "*.post_layernorm.*": 1e-2}, torch.float64)
    b, = pairs(folder, [range(8)])
    (one,), _ = blip2.compare_blip2(model, [b], world(), blip2.itc_loss, (0, 0))
    image, text, t, itm, itg = model(b, one)
    (blip2.itc_loss(image, text, t).mean() + itm.mean() + itg / (len(b.ids) - 8)).backward()
    assert off(found, {k: p.grad for k, p in model.named_parameters() if p.requires_grad}) < GATE


# ---- transformers ---------------------------------------------------------------------------------------------------

def test_scores_are_those_of_transformers(tmp_path):
    """Blip2ForImageTextRetrieval, ITC and ITM, in float64"""
    T = pytest.importorskip("transformers")
    from test_families_qformer import EVA, PRE, QFORMER
    from test_llava import random
    from test_model import exact_norms, pixels

    from formats.pairs import with_ends
    config = T.Blip2Config(vision_config=EVA, qformer_config=QFORMER | {"use_qformer_text_input": True,
                           "vocab_size": 512}, text_config={"model_type": "opt"}, num_query_tokens=3,
                           image_text_hidden_size=8, attn_implementation="sdpa")
    theirs = random(T.Blip2ForImageTextRetrieval(config))
    theirs.save_pretrained(tmp_path / "x")
    spec, names = (json.loads((ROOT / "demo/llm" / n).read_text()) for n in ("tokenizer.json", "tokenizer_config.json"))
    spec, names, _ = with_ends(spec, names, "blip2")
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 500, "content": "[DEC]"})
    for name, x in (("tokenizer.json", spec), ("tokenizer_config.json", names), ("preprocessor_config.json", PRE)):
        (tmp_path / "x" / name).write_text(json.dumps(x))
    mine, folder = load_blip2(tmp_path / "x")
    mine, theirs = mine.double(), exact_norms(theirs.double().eval())
    theirs.config.image_token_index = None
    b, = pairs(folder, [range(4)])
    texts = blip2.texts_of(b)
    width = int(texts.counts.max())
    ids = torch.stack([F.pad(t, (0, width - len(t))) for t in texts.words.split(texts.counts.tolist())])
    ask = dict(pixel_values=pixels(b.images, mine.cfg.vision).double(), input_ids=ids,
               attention_mask=(torch.arange(width) < texts.counts[:, None]).long())
    with torch.no_grad():
        image, text, _, features = mine(b)
        itc = theirs(**ask).logits_per_image
        assert (blip2.similarities(image, text) - itc).abs().max() < 1e-10 and itc.std() > 0.01
        itm = theirs(**ask, use_image_text_matching_head=True).logits_per_image
        assert (mine.match(features, texts) - itm).abs().max() < 1e-10 * itm.abs().max() and itm.std() > 0.01


# ---- runs -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tower, tmp_path_factory):
    at = tmp_path_factory.mktemp("pairs")
    file = write_data(at, "train.jsonl", 28)
    kept = [row for row in map(json.loads, file.read_text().splitlines()) if "image" in row]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return dict(data=str(file), images=str(at / "images"), device="cpu", batch_size=8, max_tokens=40, steps=4,
                save_every=2, log_every=1, parts=TINY, kind="blip2", vision=str(tower), lr=2e-3)


def run(data, out, **changes):
    return train_pairs.main(train_pairs.Settings(**{**data, "out": str(out), **changes}))


def test_a_run_trains_and_comes_back(data, tmp_path):
    assert run(data, tmp_path / "one") is None
    model, folder = load_blip2(tmp_path / "one")
    logged = [row for row in rows(tmp_path / "one/log.jsonl") if "loss" in row]
    assert len(logged) == 4 and logged[-1]["loss"] < logged[0]["loss"] and model.temperature.item() < 0.1
    save_blip2(tmp_path / "again", model.state_dict(), model.cfg, folder, torch.float16)
    one, two = (load_file(p / "model.safetensors") for p in (tmp_path / "one/model", tmp_path / "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert load_blip2(tmp_path / "again")[0].cfg == model.cfg


def test_a_stopped_run_ends_with_the_same_bits(data, tmp_path):
    import shutil
    run(data, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoints/step_0000004")
    (tmp_path / "two/finished.json").unlink()
    run(data, tmp_path / "two")
    assert state(tmp_path / "one", 4) == state(tmp_path / "two", 4)


def test_the_second_stage_starts_from_it(data, tower, tmp_path):
    """train_align.py reads tower, last norm and Q-Former; the projection alone is new"""
    run(data, tmp_path / "a")
    first = load_blip2(tmp_path / "a")[0].state_dict()
    parts = " ".join(["connector=qformer tokens=3 vision.feature_layer=-1 vision.feature_norm=true "
                      "vision.keep_class=true", *(f"connector_args.{x}" for x in SIZES)])
    for vision, new in ((tmp_path / "a/model", {"projection"}), (tower, None)):
        model, _ = llava.load_model(str(vision), str(ROOT / "demo/llm"), parts=parts, dtype=torch.float16)
        state_dict = model.state_dict()
        same = {k for k in first if k in state_dict and torch.equal(first[k], state_dict[k])}
        former = {k for k in state_dict if k.startswith("multi_modal_projector.")}
        assert (former - same == {f"multi_modal_projector.projection.{x}" for x in ("weight", "bias")}) == bool(new)
        assert bool(new) == ("vision_tower.vision_model.post_layernorm.weight" in same)
    out = str(tmp_path / "align")
    settings = {k: x for k, x in data.items() if k not in ("kind", "parts", "vision")}
    assert train_align.main(train_align.Settings(**{**settings, "vision": str(tmp_path / "a/model"), "parts": parts,
                                                    "max_len": 40, "max_tokens": 80, "out": out})) is None
    wrong = parts.replace("tokens=3", "tokens=4")
    assert "query_embedding" in error(llava.load_model, str(tmp_path / "a/model"), str(ROOT / "demo/llm"), parts=wrong)


def test_retrieval_sorts_again_by_itm(data, tmp_path, capsys):
    run(data, tmp_path / "run", steps=2)
    ask = dict(model=str(tmp_path / "run"), data=data["data"], images=data["images"])
    found = []
    for k in (0, 4):
        retrieval.main(retrieval.Settings(**ask, rerank=k))
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found[0]["n"] == found[1]["n"] == 21 and found[0]["image_to_text"]["10"] >= found[1]["image_to_text"]["1"]
    towers, pairs = retrieval.Towers(ask["model"]), retrieval.read_pairs(ask["data"], ask["images"])
    paths, captions = map(list, zip(*pairs))
    similar = blip2.similarities(towers.images(paths), towers.texts(captions))
    there, back = retrieval.reranked(towers, paths, captions, similar, 3)
    with torch.no_grad():
        i, j = 2, int(there[2].argmax())
        logit = towers.model.match(towers.features(paths[i : i + 1]), blip2.texts_of(towers.batch([captions[j]])))[0, 1]
        assert abs(there[i, j] - similar[i, j] - logit) < 1e-5 and (there > -500).sum() == 3 * len(paths)
        i, j = int(back[4].argmax()), 4
        logit = towers.model.match(towers.features(paths[i : i + 1]), blip2.texts_of(towers.batch([captions[j]])))[0, 1]
        assert abs(back[j, i] - similar[i, j] - logit) < 1e-5


@pytest.mark.parametrize("toy", [True, False])
def test_the_recipe_knows_the_first_stage(toy, monkeypatch):
    monkeypatch.chdir(ROOT)
    s = parse(train_pairs.Settings, ["recipes/blip2.py", *["--data=toy"] * toy])
    assert s.kind == "blip2" and not s.train and s.llm == "" and s.out == "runs/blip2_pairs"
    assert s.batch_size == (64 if toy else 1680) and f"tokens={12 if toy else 32}" in s.parts
    if toy:
        model, _ = load_blip2(tokenizer=s.tokenizer, vision=s.vision, parts=s.parts)
        align = parse(train_align.Settings, ["recipes/blip2.py", "--data=toy"])
        q, args = model.cfg.qformer, dict(x.split("=") for x in align.parts.split())
        assert {k: str(getattr(q, k.partition(".")[2])) for k in args if k.startswith("connector_args.")} == {
            k: x for k, x in args.items() if k.startswith("connector_args.")}, "the second stage has the same sizes"


def test_contradictions_end_in_one_line(data, tmp_path):
    assert "needs a vision tower" in error(run, data, tmp_path / "x", vision="")
    assert "two usable pairs" in error(run, data, tmp_path / "x", batch_size=1)

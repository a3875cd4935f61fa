"""Exact match and recall of captions during a run, beside definitions that share no code with them."""

import copy
import json

import pytest
import torch
from conftest import error, fork
from tiny_runs import LORA, rows, run, state, write_validation

import data
import engine
import generate
from formats import configs, llava
from formats.rows import open_rows
from images import Layout
from run import held_out
from run.validate import Validation, logits_of_rank_0


@pytest.fixture(scope="module")
def asked(world, tmp_path_factory):
    """Settings with eight validation samples, every fourth without an image; all but one answer have three words"""
    texts = [(f" {i}", "a long black cat" if i == 1 else f"a cat {i}") for i in range(8)]
    file = write_validation(tmp_path_factory.mktemp("asked"), world, texts)
    return {**world, "val_data": file, "eval_every": 2, "sample_every": 0, "save_every": 6}


@pytest.fixture(scope="module")
def tiny(asked, tmp_path_factory):
    """-> model, formats.llava.Folder, data.Steps of the validation data, in fp64"""
    model, folder = llava.load_model(asked["vision"], asked["llm"])
    encode = data.Encoder(folder.tok, "vicuna_v1", Layout(model.cfg.image_token_index, 4), 48, "")
    spec = configs.image_spec(folder.pre, "pad")
    return model.double().eval(), folder, data.Steps(asked["val_data"], asked["images"], encode, spec, 4, 96, 0)


def questions(steps, n, *wanted):
    return held_out.first_questions(steps, data.conversation, steps.images, n, *wanted)


def test_short_answers_about_images_are_asked(tiny):
    """Of samples 0 to 7: 1 has four words, 3 and 7 have no image"""
    steps = tiny[2]
    assert [q.row["id"] for q in questions(steps, 99, held_out.short_answers)] == [100, 102, 104, 105, 106]
    assert [q.row["id"] for q in questions(steps, 2, held_out.short_answers)] == [100, 102]


def test_rows_that_cannot_be_read_are_passed_over(tiny, tmp_path):
    steps, lines = tiny[2], [json.dumps(tiny[2].files[0][i]) for i in (0, 2)]
    kept = steps.files[0]
    (tmp_path / "x.jsonl").write_text("\n".join([lines[0], "{broken", lines[1]]))
    steps.files[0] = open_rows(tmp_path / "x.jsonl")
    try:
        assert [q.row["id"] for q in questions(steps, 9)] == [100, 102] and questions(steps, 0) == []
    finally:
        steps.files[0] = kept


def test_captions_of_a_pool_are_distinct(tiny):
    steps = tiny[2]
    kept = steps.files[0]
    twice = [kept[0], {**kept[1], "conversations": kept[0]["conversations"]}, kept[2],
             {**kept[4], "conversations": kept[4]["conversations"] * 2}, kept[5]]
    steps.files[0] = twice
    try:
        assert [q.row["id"] for q in questions(steps, 9, held_out.distinct_captions())] == [100, 102, 105]
    finally:
        steps.files[0] = kept


def test_exact_match_counts_equal_answers(tiny):
    found, limits = questions(tiny[2], 9, held_out.short_answers), []

    def ask(prompts, pixels, most):
        assert len(prompts) == len(pixels) and sum(map(len, prompts)) + most * len(prompts) <= 96
        limits.append((len(prompts), most))
        said = {tuple(q.prompt.tolist()): q.truth for q in found}
        return [said[tuple(p.tolist())].upper() + "." if len(limits) == 1 else "a dog" for p in prompts]
    share = held_out.exact_match(found, ask, tiny[2])
    tok = tiny[1].tok
    longest = max(len(tok.full.encode(q.truth, add_special_tokens=False).ids) for q in found)
    assert sum(n for n, _ in limits) == len(found) and share == limits[0][0] / len(found) > 0
    assert {most for _, most in limits} <= {longest + 2, longest + 1}           # the end token, and one more


def test_ranks_are_those_of_one_by_one(tiny):
    """The log p of each caption alone, token by token from the logits, in fp64"""
    model, _, steps = tiny
    pool = questions(steps, 4, held_out.distinct_captions())
    world = type("World", (), dict(autocast=lambda self: torch.autocast("cpu", enabled=False), device="cpu"))()
    log_p = torch.zeros(4, 4, dtype=torch.float64)
    with torch.no_grad():
        for i, q in enumerate(pool):
            for j, other in enumerate(pool):
                ids, labels = steps.encode.encode([(q.text, other.truth)], q.blocks, q.system)
                batch = data.pack([(ids, labels, q.pixels[0])], 8)
                p = model(*batch, head=generate.logits_head).log_softmax(-1)
                log_p[i, j] = p.gather(1, batch.labels[batch.labels >= 0][:, None]).sum()
    ranks = held_out.caption_ranks(pool, model, steps, world)
    assert ranks.tolist() == [sum(p > row[i] for p in row) for i, row in enumerate(log_p)]
    order = torch.argsort(log_p[0], descending=True).tolist()                  # every place of the right caption occurs
    for place, j in enumerate(order):
        moved = [pool[0]._replace(truth=pool[j].truth), *(q for i, q in enumerate(pool) if i != j)]
        assert held_out.caption_ranks(moved, model, steps, world)[0] == place


def test_a_model_of_nan_ranks_last(tiny, monkeypatch):
    """And so keep_best=val_r1 does not keep it"""
    def lost(model, b, D):
        return torch.full((len(b.images),), torch.nan), None
    monkeypatch.setattr(held_out, "sequence_log_probs", lost)
    world = type("World", (), dict(autocast=lambda self: torch.autocast("cpu", enabled=False), device="cpu"))()
    pool = questions(tiny[2], 3, held_out.distinct_captions())
    assert held_out.caption_ranks(pool, None, tiny[2], world).tolist() == [3, 3, 3]


def test_scores_of_a_run_change_no_bit(asked, tmp_path):
    """Dropout is on. val_exact and val_r1 are in log.jsonl, those of the last step are those of the published model."""
    three = dict(steps=3, eval_every=1, save_every=3, eval_questions=2)
    run("sft", asked, tmp_path / "scored", **three, **LORA)
    run("sft", {**asked, "val_data": ""}, tmp_path / "blind", **three, **LORA)
    assert state(tmp_path / "scored", 3) == state(tmp_path / "blind", 3)
    scored = [r for r in rows(tmp_path / "scored/log.jsonl") if "val_loss" in r]
    assert [r["step"] for r in scored] == [1, 2, 3] and all(0 <= r["val_exact"] <= 1 for r in scored)
    run("align", asked, tmp_path / "captions", eval_captions=4, **three)
    run("align", {**asked, "val_data": ""}, tmp_path / "none", eval_captions=4, **three)
    assert state(tmp_path / "captions", 3) == state(tmp_path / "none", 3)
    scored = [r for r in rows(tmp_path / "captions/log.jsonl") if "val_loss" in r]
    assert all(0 <= r["val_r1"] <= r["val_r5"] == 1 and "val_exact" not in r for r in scored)


def test_a_model_that_learned_answers_scores_one(asked, tmp_path, monkeypatch):
    """Answers as in the data score 1, and wrong ones 0: each is compared with its own truth."""
    truths = {}
    made = Validation.__init__

    def noting(self, *args):
        made(self, *args)
        truths.update({tuple(q.prompt.tolist()): q.truth for q in self.short})
    monkeypatch.setattr(Validation, "__init__", noting)
    monkeypatch.setattr(generate.Chat, "answers", lambda self, prompts, pixels, *_: [
        truths.get(tuple(p.tolist())) for p in prompts])
    run("sft", asked, tmp_path / "right", steps=1)
    assert rows(tmp_path / "right/log.jsonl")[-1]["val_exact"] == 1
    monkeypatch.setattr(generate.Chat, "answers", lambda self, prompts, pixels, *_: [
        truths.get(tuple(prompts[0].tolist())) for _ in prompts])
    run("sft", asked, tmp_path / "mixed", steps=1, max_tokens=1024)
    assert rows(tmp_path / "mixed/log.jsonl")[-1]["val_exact"] == 1 / 5


def test_two_ranks_score_and_keep_alike(asked, tmp_path, monkeypatch):
    """With shards, no rank waits for another one, and all agree on the best step and on the end."""
    settings = {**asked, "dtype": "fp64", "steps": 4, "eval_every": 1, "save_every": 0, "eval_questions": 3}
    out, how = tmp_path / "run", dict(keep_best="val_r1", patience=1, eval_captions=3, parallel="fsdp")
    run("align", settings, tmp_path / "one", **how)
    fork(2, lambda rank: run("align", settings, out, **how), tmp_path)
    one, two = ([{k: r.get(k) for k in ("step", "val_r1", "val_r5")} for r in rows(p / "log.jsonl") if "val_r1" in r]
                for p in (tmp_path / "one", out))
    best = max(range(len(one)), key=lambda i: one[i]["val_r1"])
    assert one == two and len(two) == min(4, best + 2)                         # one more than the best, then it is over
    kept = sorted(int(p.name.removeprefix("step_")) for p in (out / "checkpoints").iterdir())
    assert kept == sorted({best + 1, len(two)}) and (out / "best/model").is_dir()


def test_ranks_generate_the_tokens_of_rank_0(tiny, tmp_path):
    """With shards. The logits of rank 1 are reversed, so alone it would choose other tokens, and end elsewhere."""
    model, _, steps = tiny
    asked = questions(steps, 3)
    what = [q.prompt for q in asked], torch.cat([x for q in asked for x in q.pixels])
    alone = generate.generate(model, *what, [], 4)
    ends = [alone[0][2]]

    def generated(rank):
        world, copied = engine.start("cpu", "fp64"), copy.deepcopy(model)
        if rank == 1:
            copied.register_forward_hook(lambda module, args, logits: logits.flip(-1))
        sharded = engine.parallelize(copied, world, copied.blocks, "fsdp")
        with logits_of_rank_0(sharded, world):
            first = generate.generate(sharded, *what, ends, 4)
        return first, len(sharded._forward_hooks)
    first, second = fork(2, generated, tmp_path)
    assert first[0] == second[0] == generate.generate(model, *what, ends, 4) != alone
    assert second[1] == first[1] + 1                                           # the hook of rank 1 alone is left


def test_ranks_must_read_the_same_questions(tiny):
    val = Validation.__new__(Validation)
    val.s, val.steps = type("S", (), dict(val_data="val.json", images=tiny[2].images)), tiny[2]
    val.world = type("World", (), dict(gather=lambda self, found: [found, found]))()
    assert len(val.first(2)) == 2
    val.world = type("World", (), dict(gather=lambda self, found: [found, found + 1]))()
    assert error(val.first, 2).startswith("val.json: not all ranks can read the same samples")

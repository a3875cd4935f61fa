"""Stages of growing image size: --init=RUN --parts=vision.image_size=N resamples tables of positions, nothing else."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import error, example, make_tokenizer
from test_families import SIGLIP, T, TEXT, exact_norms, paligemma, their_logits
from test_llava import random
from test_model import PARITY, all_logits, pixels
from test_model import their_logits as llava_logits
from tiny_runs import LORA, halves_agree, refusal, run, state, write_whole_tower

from data import pack
from formats import configs, llava
from generate import Chat
from model import VisionConfig
from parts.resize import grid, processor, resampled
from parts.spans import span_ends

TABLE = "vision_tower.vision_model.embeddings.position_embedding.weight"
LARGE = "vision.image_size=16"               # of the tiny towers, which have 8 x 8 pixels and 2 x 2 patches


def opened(init, parts=""):
    model, folder = llava.load_model(init=init, parts=parts, dtype=torch.float32)
    return model, folder, model.state_dict()


def unchanged(before, after, but=(TABLE,)):
    """Are two state dicts bit-equal, except for tensors of another shape, which `but` lists?"""
    assert before.keys() == after.keys()
    changed = {k for k in before if before[k].shape != after[k].shape}
    return changed == set(but) and all(torch.equal(before[k], after[k]) for k in before.keys() - changed)


# ---- tables ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, first", [("clip_vision_model", 1), ("siglip_vision_model", 0),
                                         ("dinov2_with_registers", 1)])
@pytest.mark.parametrize("n, m", [(4, 7), (7, 3), (3, 12)])
def test_a_table_is_interpolated_as_by_torch(kind, first, n, m):
    v = VisionConfig(kind, image_size=n * 4, patch_size=4)
    table = torch.randn(first + n * n, 6, generator=torch.Generator().manual_seed(n))
    got = resampled(table, v, m * 4)
    want = F.interpolate(table[first:].T.reshape(1, 6, n, n), size=(m, m), mode="bicubic", align_corners=False,
                         antialias="registers" in kind)
    assert torch.equal(got[:first], table[:first]) and torch.equal(got[first:], want.reshape(6, m * m).T)
    wrong = F.interpolate(table[first:].T.reshape(1, 6, n, n), size=(m, m), mode="bicubic", align_corners=True)
    assert (got[first:] - wrong.reshape(6, m * m).T).abs().max() > 0.01
    assert resampled(table, v, n * 4) is table


def test_a_constant_table_stays_constant():
    assert (grid(torch.full((9, 2), 3.0), 5) - 3).abs().max() < 1e-6


def test_a_processor_keeps_its_proportions():
    for pre, want in [
            ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3},
             {"size": {"shortest_edge": 512}, "crop_size": {"height": 448, "width": 448}, "resample": 3}),
            ({"size": {"height": 224, "width": 224}, "crop_size": None},
             {"size": {"height": 448, "width": 448}, "crop_size": None}), ({"size": 224}, {"size": 448})]:
        assert processor(pre, 224, 448) == want


# ---- LLaVA ----------------------------------------------------------------------------------------------------------

def test_the_same_size_changes_no_bit(aligned):
    (a, source, before), (b, again, after) = opened(aligned), opened(aligned, "vision.image_size=8")
    assert a.cfg == b.cfg and all(torch.equal(before[k], after[k]) for k in before) and before.keys() == after.keys()
    assert source.digests == again.digests and not any("resampled" in n for n in again.notes)


def test_only_the_table_of_positions_changes(aligned):
    (small, _, before), (large, folder, after) = opened(aligned), opened(aligned, LARGE)
    assert unchanged(before, after)
    want = F.interpolate(before[TABLE][1:].T.reshape(1, 32, 2, 2), size=(4, 4), mode="bicubic")
    want = want.reshape(32, 16).T.half().float()               # the table has the dtype of the folder
    assert torch.equal(after[TABLE], torch.cat([before[TABLE][:1], want]))
    assert (small.cfg.image_tokens, large.cfg.image_tokens) == (4, 16)
    assert "images of side 16, the tower was trained on 8: its positions are resampled" in folder.notes


@pytest.fixture(scope="module")
def large(aligned, world, tmp_path_factory):
    """A finished second stage at 16 x 16 pixels, after a first at 8 x 8"""
    out = tmp_path_factory.mktemp("large") / "sft"
    assert run("sft", world, out, init=str(aligned), parts=LARGE, template="vicuna_v1", save_dtype="fp32") is None
    return out


def test_a_second_stage_has_larger_images(large, aligned, world, capsys):
    model, folder, trained = opened(large)
    assert model.cfg.vision.image_size == 16 and configs.image_spec(folder.pre, "pad").side == 16
    frozen = opened(aligned, LARGE)[2]
    assert all(torch.equal(trained[k], frozen[k].half().float()) or k.startswith(("language", "multi"))
               for k in trained), "the tower is that of stage 1, rounded as published there"
    c = json.loads((large / "model" / "config.json").read_text())
    assert c["vision_config"]["image_size"] == 16 and c["image_seq_length"] == 16
    pre = json.loads((large / "model" / "preprocessor_config.json").read_text())
    assert pre["crop_size"] == {"height": 16, "width": 16}
    asked = Chat(large, "cpu")
    assert asked.look([f"{world['images']}/0.png"])[0][0].shape[-1] == 16
    assert isinstance(asked.ask(f"{world['images']}/0.png", "What?", 2), str)


def test_transformers_opens_the_larger_llava(large):
    mine = llava.load_model(init=large, dtype=torch.float64)[0]
    theirs, info = T.LlavaForConditionalGeneration.from_pretrained(large / "model", output_loading_info=True,
                                                                   dtype=torch.float64)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    made = [example(1, model_patches=16, side=16), example(2, images=0, text=14, side=16),
            example(3, images=3, text=5, model_patches=16, side=16)]
    with torch.no_grad():
        found = all_logits(mine, pack(made, 16))
    true = llava_logits(exact_norms(theirs.eval()), made, mine.cfg.vision)
    assert (found - true).abs().max() < PARITY * true.abs().max()


def test_a_resumed_run_of_larger_images_ends_alike(large, aligned, world, tmp_path):
    how = dict(init=str(aligned), parts=LARGE, template="vicuna_v1", save_dtype="fp32")
    assert run("sft", world, tmp_path / "again", **how, resume=str(large / "checkpoints/step_0000004")) is None
    assert state(tmp_path / "again") == state(large)
    assert f"was trained with parts={LARGE}, not ;" in refusal("sft", world, tmp_path / "other", **how | {"parts": ""},
                                                               resume=str(large / "checkpoints/step_0000004"))


def test_an_adapter_remembers_the_larger_images(aligned, world, tmp_path):
    assert run("sft", world, tmp_path / "lora", init=str(aligned), parts=LARGE, template="vicuna_v1", **LORA) is None
    a, b = (Chat(tmp_path / "lora" / part, "cpu", "fp32") for part in ("adapter", "model"))
    assert a.cfg == b.cfg and a.cfg.vision.image_size == 16 and a.spec == b.spec
    halves_agree(a, b)


# ---- PaliGemma ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def siglip_family(tmp_path_factory):
    """-> folder of a tiny PaliGemma as transformers writes it, their model in float64"""
    at = tmp_path_factory.mktemp("paligemma")
    theirs, pre = paligemma(TEXT | {"model_type": "gemma"})
    random(theirs).save_pretrained(at)
    make_tokenizer(at)
    (at / "preprocessor_config.json").write_text(json.dumps(pre))
    return at, exact_norms(theirs.double().eval())


def test_transformers_opens_the_larger_paligemma(siglip_family, tmp_path):
    at, theirs = siglip_family
    mine, folder = llava.load_model(init=at, dtype=torch.float64, parts=LARGE)
    small = llava.load_model(init=at, dtype=torch.float64)[0]
    assert SIGLIP["image_size"] == 8 and unchanged(small.state_dict(), mine.state_dict())
    made = [example(1, model_patches=16, side=16), example(3, images=3, text=5, model_patches=16, side=16)]
    tower = next(m for m in theirs.modules() if type(m).__name__ == "SiglipVisionModel")
    with torch.no_grad():                                       # their own way to the larger size: at every call
        want = tower(pixels(made[1][2], mine.cfg.vision).double(), interpolate_pos_encoding=True).last_hidden_state
        found = mine.vision_tower(made[1][2])
        assert (found - want).abs().max() < 1e-6 * want.abs().max(), "our table is interpolated from fp32 weights"
    llava.save_model(tmp_path / "out", mine.state_dict(), mine.cfg, folder, "paligemma", "", "squash", torch.float32)
    model, info = T.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True,
                                                                      dtype=torch.float64)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    pre = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert pre["size"] == {"height": 16, "width": 16} and pre["image_seq_length"] == 16
    mine = llava.load_model(init=tmp_path / "out", dtype=torch.float64)[0]
    true = torch.cat([their_logits(exact_norms(model.eval()), mine, *e) for e in made])
    with torch.no_grad():
        assert (all_logits(mine, pack(made, 16, span_ends(mine.cfg))) - true).abs().max() < PARITY * true.abs().max()


# ---- other towers and connectors ------------------------------------------------------------------------------------

QWEN = ("vision.model_type=qwen_vl_vision vision.num_hidden_layers=2 vision.feature_layer=-1 vision.position_side=2 "
        "connector=resampler tokens=4 connector_args.heads=4")
PARTS = {"qwen": (QWEN, (), 4), "resampler": ("connector=resampler tokens=4 connector_args.heads=4", (TABLE,), 4),
         "qformer": ("connector=qformer tokens=3 connector_args.hidden_size=32 connector_args.num_hidden_layers=1 "
                     "connector_args.num_attention_heads=2 connector_args.intermediate_size=48", (TABLE,), 3),
         "abstractor": ("connector=abstractor tokens=4 connector_args.width=8 connector_args.depth=1",
                        (TABLE, "multi_modal_projector.position_embedding"), 4),
         "pool": ("connector=pool tokens=1", (TABLE,), 1), "shuffle": ("connector=shuffle tokens=1", (TABLE,), 4),
         "matrix": ("connector=shuffle_linear tokens=1", (TABLE,), 4),
         "class token": ("connector=linear_norm tokens=5 vision.keep_class=true", (TABLE,), 17)}


@pytest.mark.parametrize("name", PARTS)
def test_every_connector_reads_larger_images(name, world, tmp_path):
    parts, tables, tokens = PARTS[name]
    train = "multi_modal_projector.*=1e-3" + " vision_tower.*=1e-3" * (name == "qwen")
    assert run("align", world, tmp_path / "small", parts=parts, steps=1, train=train, save_dtype="fp32") is None
    (small, _, before), (large, _, after) = opened(tmp_path / "small"), opened(tmp_path / "small", LARGE)
    assert unchanged(before, after, tables) and large.cfg.image_tokens == tokens
    assert large.cfg.vision.patches == 16 == 4 * small.cfg.vision.patches
    if name == "abstractor":
        table, = (x for k, x in before.items() if k.endswith("projector.position_embedding"))
        want = F.interpolate(table.T.reshape(1, 32, 2, 2), size=(4, 4), mode="bicubic").reshape(32, 16).T
        assert torch.equal(after["multi_modal_projector.position_embedding"], want)
    grown = dict(init=str(tmp_path / "small"), parts=LARGE, train=train, steps=2)
    assert run("sft", world, tmp_path / "large", **grown) is None
    model, folder, _ = opened(tmp_path / "large")
    assert model.cfg == large.cfg and configs.image_spec(folder.pre, "squash").side == 16


def test_two_towers_grow_together(world, tmp_path):
    second = write_whole_tower(tmp_path / "second")
    parts = f"connector=comm second={second} vision.feature_layer=[1,2] second.feature_layer=[2,3]"
    assert run("align", world, tmp_path / "small", parts=parts, steps=1, train="multi_modal_projector.*=1e-3") is None
    (_, _, before), (large, _, after) = opened(tmp_path / "small"), opened(tmp_path / "small", LARGE)
    assert unchanged(before, after, (TABLE, TABLE.replace("tower.", "tower.second.")))
    assert large.cfg.second.image_size == 16


@pytest.mark.parametrize("parts, says", [
    ("mask=prefix", "only vision.image_size=N may change, so parts=mask=prefix would not be read"),
    ("vision.image_size=16 tokens=4", "would not be read"), ("vision.image_size=1.5", "would not be read"),
    ("vision.image_size=3", "images of side 3; this vision tower was trained on 8"),
    ("vision.image_size=33", "its positions can be resampled for 4 to 32")])
def test_nothing_else_of_init_may_change(parts, says, aligned, world, tmp_path):
    assert says in refusal("sft", world, tmp_path / "x", init=str(aligned), parts=parts)


def test_impossible_sizes_are_one_line(world, tmp_path):
    grid = 'connector=shuffle tokens=1 layout={"kind":"grid","most":2}'
    for parts, size, says in [(grid, 16, "into tiles, and their size cannot change"),
                              (QWEN, 0, "resampled for 4 to 32"), (QWEN, 36, "resampled for 4 to 32"),
                              ("connector=shuffle_linear tokens=1", 12, "9 patches are not groups of 2 x 2"),
                              ("connector=shuffle tokens=1", 12, "9 patches are not groups of 2 x 2"),
                              ("connector=pool tokens=4", 4, "pooling cannot turn 1 patches into tokens=4")]:
        out = tmp_path / str(size) / parts[10:26]
        assert run("align", world, out, parts=parts, steps=1) is None
        assert says in error(llava.load_model, init=out, parts=f"vision.image_size={size}")

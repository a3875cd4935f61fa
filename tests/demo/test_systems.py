"""The measurement of all systems: every arm can be run, and the tables say what the rows say. (Runs take hours.)"""

import json

import pytest
from conftest import ROOT, error
from tiny_runs import SCRIPTS

import config
import engine
from demo import systems, toy, variants
from formats import llava
from run import stage
from run.arguments import parse

# the systems themselves are in tests/test_recipes.py
ARMS = [arm for arm in systems.ARMS if not arm.endswith("_full") and arm not in systems.SYSTEMS]


def settings(arm):
    """-> the settings of both stages, as the scripts parse them"""
    system, first, second, _ = systems.ARMS[arm]
    recipe = [] if system == "llava15" else [str(ROOT / f"recipes/{system}.py")]
    return [parse(SCRIPTS[name].Settings, [*recipe, *systems.ONE, *changed])
            for name, changed in (("align", first), ("sft", ["--init=x", *second]))]


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_can_be_run(arm, monkeypatch):
    """The model is built, and both stages find the weights that they train"""
    monkeypatch.chdir(ROOT)
    align, sft = settings(arm)
    world = engine.World(0, 1, engine.torch.device("cpu"), engine.torch.float32)
    for s in (align, sft):
        config.check_ranges(s)
        vision = align.vision if f"--vision={align.vision}" not in systems.PAIRS else "demo/vit"     # of the same size
        model, _ = llava.load_model(vision, align.llm, connector=align.connector, parts=align.parts)
        usual = {"multi_modal_projector.*": s.lr} if s is align else SCRIPTS["sft"].who_trains(s, model)
        assert engine.choose(model, stage.training_table(s, usual), world.dtype, world.device)
    assert align.epochs == sft.epochs == 1.0 and not align.steps and not sft.steps, "equal data and steps"
    assert align.batch_size == sft.batch_size == 16


def test_full_arms_run_the_recipes_own_length():
    for system in systems.SYSTEMS:
        full, recipe = settings(f"{system}_full"), [] if system == "llava15" else [str(ROOT / f"recipes/{system}.py")]
        for name, s in zip(("align", "sft"), full):
            own = parse(SCRIPTS[name].Settings, [*recipe, "--data=toy", *(["--init=x"] if name == "sft" else [])])
            assert (s.epochs, s.steps) == (own.epochs, own.steps)


def test_findings_compare_arms_that_exist():
    for claim, more, less, what, sign in systems.FINDINGS:
        assert {*more.split("|"), *less.split("|")} <= {*systems.ARMS} and more != less, claim
        assert what == "all" or what in toy.TYPES
        assert sign in (">", "=")


def row(arm, seed, seeing, read=0.5):
    return {"arm": arm, "seed": seed, "seeing": seeing, "blind": 0.25, "types": {"place": 1.0, "read": read}, "n": 4,
            "tokens": 36, "trained": [33024, 968064], "steps": [250, 551], "cpu_s": 100}


def test_tables_have_means_deviations_and_verdicts():
    """By hand: 90 and 94 have mean 92 and deviation 2.83; 50 and 54 are 40 less, and 40 > 2 x 2.83"""
    rows = systems.by_arm([row("llava15", 0, 0.90), row("llava15", 1, 0.94), row("fuyu", 0, 0.50), row("fuyu", 1, 0.54),
                           row("llava15_trained_vit", 0, 0.91), row("llava15_trained_vit", 1, 0.95),
                           row("internvl15_4_tiles", 0, 0.9, read=0.875), row("internvl15_1_tiles", 0, 0.9, read=0.25)])
    lines = systems.table(rows)
    assert "| LLaVA-1.5 | 2 | 92.0 ± 2.8 | 25.0 ± 0.0 | 100 | 50 | 36 | 0.03 M + 0.97 M | 100 |" in lines
    assert len(lines) == 4, "two systems have rows, and arms that are no system have none"
    found = "\n".join(systems.findings(rows))
    assert "equal steps | 92.0 | 52.0 | +40.0 | 5.7 | > | > |" in found
    assert "not worse (PaliGemma) | 92.0 | 93.0 | -1.0 | 5.7 | = | = |" in found
    assert "small digits (InternVL 1.5) | 87.5 | 25.0 | +62.5 |  | > | one seed |" in found
    assert "MMCA" not in found
    full = systems.full_table(rows | {"fuyu_full": [row("fuyu_full", 0, 0.75)]})
    assert full[2:] == ["| Fuyu | 1 | 75.0 | 25.0 | 250 + 551 | 100 |"] and systems.full_table(rows) == []


def test_a_finding_waits_for_all_its_arms():
    """A comparison at the best of three learning rates says nothing while one of the three is missing."""
    rows = {arm: [row(arm, 0, 0.9)] for arm in (*systems.MLP.split("|"), *systems.LINEAR.split("|"))}
    assert "each at its best" in systems.findings(rows)[2]
    assert not any(systems.findings({k: x for k, x in rows.items() if k != arm}) for arm in rows)


def test_an_unknown_arm_stops():
    assert "llava15" in error(systems.main, systems.Settings(only="llava16"))


def test_a_failed_run_is_named():
    assert "ended with 1: too small" in error(systems.command, "-c", "import sys; sys.exit('too small')")


def test_variants_need_a_toy_world(tmp_path):
    for args in ([str(tmp_path)], [str(tmp_path / "gone")], ["a", "b"]):
        assert "holds no toy world" in error(variants.main, args)


def test_large_images_show_scenes_with_small_signs(tmp_path, monkeypatch):
    sizes = dict(align=2, sft=6, test=6)
    monkeypatch.setattr(variants.toy, "SCENES", {**toy.SCENES, **sizes, "val_align": 1, "val_sft": 1})
    toy.write_world(tmp_path, **sizes, val_align=1, val_sft=1)
    variants.write_variants(tmp_path)
    small = {name: scene for name, scene, _ in variants.scenes("sft", 6)}
    drawn = [(n, s) for _, n, s, _ in toy.draw_scenes(tmp_path, "sft", 6, 0)]
    assert drawn == list(small.items()), "the same scenes"
    signs = 0
    for name, scene in small.items():
        image = toy_image(tmp_path / "large" / name)
        assert image.size == (144, 144)
        if sign := scene["sign"]:
            x, y = (48 * k + 24 - (12 if k == 1 else 0) for k in (sign["column"], sign["row"]))
            box = image.crop((x - 7, y - 9, x + 7, y + 9)).convert("L")
            white = sum(v > 240 for v in box.tobytes()) / (14 * 18)
            assert 0.4 < white < 0.95 and not (x - 8 < 72 < x + 8) and not (y - 10 < 72 < y + 10), "between two tiles"
            signs += 1
    assert signs >= 2
    rows = json.loads((tmp_path / "sft_images.json").read_text())
    assert rows == [r for r in json.loads((tmp_path / "sft.json").read_text()) if "image" in r]
    questions = [json.loads(line) for line in (tmp_path / "text_questions.jsonl").read_text().splitlines()]
    assert len({q["question_id"] for q in questions}) == len(questions) > 36
    assert all("image" not in q and q["text"].endswith(toy.SHORT) and q["answer"] for q in questions)


def toy_image(file):
    from PIL import Image
    return Image.open(file).convert("RGB")

"""The model card says what is true of a run, and what it tells people to type works."""

import json
import re
import shutil

import pytest
from PIL import Image
from test_stages import aligned, run, signals, world  # noqa: F401  (fixtures)

import eval as evaluation
from formats import card, llava, whole
from model import VLMConfig


@pytest.fixture(scope="module")
def tuned(world, aligned, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("runs") / "tuned"
    run("sft", world, out, init=str(aligned / "model"), template="vicuna_v1", lora_r=2, image_aspect="crop", steps=3)
    return out


def front(text):
    return text.split("---\n")[1]


def row(text, name):
    return next(line for line in text.splitlines() if line.startswith(f"| {name} |"))


def test_the_card_tells_the_way_from_the_towers_on(tuned, world):  # noqa: F811
    text = (tuned / "model" / "README.md").read_text()
    assert "from vision and llm.\n" in text and "library_name: transformers\n" in front(text)
    assert row(text, "") == "|  | align | tuned |" and row(text, "steps") == "| steps | 6 | 3 |"
    assert row(text, "data") == "| data | train.jsonl | train.jsonl |" and row(text, "lora_r") == "| lora_r |  | 2 |"
    losses = [r["val_loss"] for r in map(json.loads, (tuned / "log.jsonl").read_text().splitlines()) if "val_loss" in r]
    assert row(text, "validation loss").endswith(f"| {losses[-1]:.4f} |")
    assert "None were measured." in text and "(crop)" in text and "LlavaImage" not in text
    assert str(tuned.parent) not in text and world["images"] not in text


def test_scores_come_into_the_card_and_the_folder_stays_whole(tuned, world, tmp_path, capsys):  # noqa: F811
    run_ = shutil.copytree(tuned, tmp_path / "run")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    rows = [{"question_id": t, "image": "a.png", "text": "What?", "answer": "a cat", "type": t} for t in "xy"]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for more in ({}, {"blind": True}, {"task": "vqa"}):
        evaluation.main(evaluation.Settings(model=str(run_ / "model"), data=str(tmp_path / "q.jsonl"), device="cpu",
                                            report=False, **more))
    text = (run_ / "model" / "README.md").read_text()
    assert re.findall(r"\| q.jsonl \| (\w+) \| (\w+) \| 2 \| 0.0% \| x 0%, y 0% \|", text) == [
        ("exact", "seeing"), ("exact", "blind"), ("vqa", "seeing")]
    assert whole.whole(run_ / "model") is None
    capsys.readouterr()


def test_a_folder_that_is_no_run_is_left_alone(tuned, tmp_path):
    shutil.copytree(tuned / "model", tmp_path / "model")
    before = (tmp_path / "model" / "README.md").read_text()
    card.remember(tmp_path, "x", {}, None)
    assert (tmp_path / "model" / "README.md").read_text() == before and not (tmp_path / "scores.json").exists()


def test_what_the_card_tells_people_to_type_works(tuned, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from generate import Chat
    folder = tuned / "model"
    monkeypatch.chdir(folder)
    Image.effect_noise((23, 14), 90).convert("RGB").save("picture.png")
    code = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    exec(code, {})
    assert len(capsys.readouterr().out) > 40
    exec(code.replace('"auto"', '"float32"'), {})
    said = capsys.readouterr().out.strip()
    speaker = Chat(folder, "cpu", "fp32")
    prompt = speaker.prompt([("<image>\nWhat is this?", None)], 1)
    assert said == speaker.answers([prompt], [speaker.pixels("picture.png")])[0]
    (folder / "picture.png").unlink()


@pytest.mark.parametrize("name, known", [
    ("lmsys/vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5"), ("/home/me/models/vicuna", "vicuna"),
    ("/c/hub/models--openai--clip-vit-large-patch14-336/snapshots/ab12", "openai/clip-vit-large-patch14-336")])
def test_places_on_this_machine_are_nobodys_business(name, known):
    assert card.known_as(name) == known


def test_what_cannot_be_done_with_a_model_is_said():
    cfg = VLMConfig()
    assert "vLLM does not" not in " ".join(card.limits(cfg, "crop")) and "SGLang" in card.limits(cfg, "crop")[0]
    cfg.connector, cfg.vision.model_type, cfg.text.model_type = "linear", "dinov2", "qwen3"
    said = " ".join(card.limits(cfg, "pad"))
    for words in ("vLLM and llama.cpp know no LLaVA with a DINOv2", "unit matrix", "4.51", "LlavaImageProcessor"):
        assert words in said
    cfg.vision.num_register_tokens = 4
    assert "refuses pictures" in card.limits(cfg, "crop")[0]

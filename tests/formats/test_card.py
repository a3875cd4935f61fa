"""Model cards: true of a run, safe with text of strangers, and never in the way of a model. Their code is run in
clients.py and test_peft.py."""

import json

import pytest

from formats import card
from model import TextConfig, VisionConfig, VLMConfig


@pytest.fixture
def run(tmp_path):
    """A run folder with what a card reads"""
    out = tmp_path / "tuned"
    out.mkdir()
    write(out)
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "val_loss": 1.5}, {"step": 3, "loss": 1.0},
            {"step": 3, "val_loss": 1.25}]
    (out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return out


def write(run, drop=(), **settings):
    settings = dict(data="/home/me/a.json:0.7,b.json:0.3", init="/home/me/runs/align/model", vision="", llm="", lr=2e-4,
                    lora_r=8, lora_alpha=16.0, bits=4, template="vicuna_v1", system="", image_aspect="crop") | settings
    about = {"settings": settings, "versions": {"revision": "abc123"}}
    (run / "config.json").write_text(json.dumps({k: v for k, v in about.items() if k not in drop}))


def test_a_card_tells_settings_and_losses(run):
    text = card.text(run, VLMConfig())
    for line in ("# tuned", "| steps | 3 |", "| validation loss | 1.25 |", "| lr | 0.0002 |", "| lora_r | 8 |",
                 "| data | a.json&#58;0.7, b.json&#58;0.3 |",
                 "Trained with pumice (revision abc123),\nstarting from align, whose"):
        assert line in text, line
    assert "/home/me" not in text and "| system |" not in text and "base_model" not in text
    assert "in four bits (NF4)" in card.adapter(run, None)
    write(run, init="", vision="openai/clip", llm="lmsys/vicuna")
    text = card.text(run, VLMConfig())
    assert "starting from openai/clip and lmsys/vicuna, whose" in text
    assert "base_model:\n- openai/clip\n- lmsys/vicuna\ntags:" in text


def test_a_torn_log_costs_no_model(run):
    """Of this run or of the one it started from: a killed run leaves half a line."""
    with open(run / "log.jsonl", "ab") as f:
        f.write(b'{"step": 4, "loss": 0.\xc3')
    assert "| steps | 3 |" in card.text(run, VLMConfig())
    init = run.parent / "align"
    (init / "model").mkdir(parents=True)
    (init / "config.json").write_text('{"settings": {}}')
    (init / "log.jsonl").write_text('{"step": 4, "lo')
    write(run, init=str(init / "model"))
    assert "starting from align" in card.text(run, VLMConfig())
    assert "over align" in card.adapter(run, str(init / "model"))


@pytest.mark.parametrize("drop", [("settings",), ("versions",), ("settings", "versions")])
def test_missing_keys_cost_no_model(run, drop):
    write(run, drop)
    assert card.text(run, VLMConfig()) and card.adapter(run, None) and card.adapter(run, "runs/gone")


def test_no_files_cost_no_model(run):
    (run / "log.jsonl").unlink()
    assert "| steps |" not in card.text(run, VLMConfig())
    (run / "config.json").write_text("{")
    assert card.text(run, VLMConfig()) and card.adapter(run, None)


def test_text_of_strangers_is_escaped(run):
    bad = "<script>alert(1)</script>\n# Buy\n[x](http://evil.example) www.evil.example `|` me@evil.example"
    write(run, system=bad, data=f"{bad}.json", init=f"runs/{bad}")
    plain = card.text(run, VLMConfig())
    text = plain.replace(card.USE, "") + card.adapter(run, f"runs/{bad}")
    for mark in ("<script", "\n# Buy", "](", "http://evil", "www.evil", "@evil", "`|`"):
        assert mark not in text, mark
    assert "&#60;script&#62;alert" in text and "&#91;x&#93;" in text and "evil.example" in text


def test_limits_of_a_model_are_told():
    cfg = VLMConfig()
    assert card.limits(cfg, "crop")[0] == "An image becomes a square of 224 x 224 pixels (crop), 49 tokens."
    cfg.connector, cfg.vision.model_type = "linear", "dinov2"
    lines = " ".join(card.limits(cfg, "pad"))
    for part in ("vLLM and llama.cpp know no LLaVA with a DINOv2", "the identity", "4.46"):
        assert part in lines
    cfg.vision.num_register_tokens = 4
    assert "refuses images" in card.limits(cfg, "crop")[0]


def test_a_card_says_who_can_read_its_folder(run):
    """LLaVA: transformers' LLaVA; another family: its own class; no class: pumice alone."""
    assert "LlavaForConditionalGeneration" in card.text(run, VLMConfig())
    other = VLMConfig(VisionConfig("siglip_vision_model", feature_layer=-1, feature_norm=True),
                      TextConfig(first_position=1), "linear", mask="prefix")
    text = card.text(run, other)
    assert "AutoModelForImageTextToText.from_pretrained" in text and "Llava" not in text.split("| setting |")[0]
    assert "chat_template" not in text and 'prompt = "<image>What is this?"' in text
    other.mask = "causal"
    text = card.text(run, other)
    assert "only pumice reads the folder" in text and "from_pretrained" not in text

"""Whole conversations of systems whose processor in transformers writes prompts alone, or that have none, as texts;
supervised text in [[ ]]."""

import itertools
import json
import shutil

import pytest
from conftest import blocks

import chat
import parts.templates  # noqa: F401
from formats.tokenizer import Tokenizer, added_token

TURNS = [("<image><image>What is this?", "a cat"), ("And this?<image>", "a dog"), ("Yes?", "No.")]
PROMPTS = {
    "blip": "<image><image><image><s>What is this?[[ a cat\n]]And this?[[ a dog\n]]Yes?[[ No.\n]]",
    "instructblip": "<image><image><image><s>What is this?[[ a cat</s>]]And this?[[ a dog</s>]]Yes?[[ No.</s>]]",
    "flamingo": "<s><image><image>Question: What is this? Answer:[[ a cat</s>]]"
                "<image>Question: And this? Answer:[[ a dog</s>]]Question: Yes? Answer:[[ No.</s>]]",
    "visualchat": "<s>SYS\n\n### Image 1:\n<image>\n### Image 2:\n<image>\n\n### Question:\nWhat is this?\n\n"
                  "### Answer:\n[[a cat</s>]]<s>### Image 3:\n<image>\n\n### Question:\nAnd this?\n\n"
                  "### Answer:\n[[a dog</s>]]<s>### Question:\nYes?\n\n### Answer:\n[[No.</s>]]",
    "idefics3": "<s>System: SYS<end_of_utterance>\nUser:<image><image>What is this?<end_of_utterance>\n"
                "Assistant:[[ a cat<end_of_utterance>]]\nUser: And this?<image><end_of_utterance>\n"
                "Assistant:[[ a dog<end_of_utterance>]]\nUser: Yes?<end_of_utterance>\n"
                "Assistant:[[ No.<end_of_utterance>]]\n",
    "llava_v0": "<s>SYS###Human: <image><image>What is this?###Assistant:[[ a cat</s>]]"
                "###Human: <image>\nAnd this?###Assistant:[[ a dog</s>]]###Human: Yes?###Assistant:[[ No.</s>]]"}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name, bytes_folder, tmp_path):
    spec = json.loads((bytes_folder / "tokenizer.json").read_text())
    spec["added_tokens"].append(added_token(len(spec["model"]["vocab"]), "<end_of_utterance>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    shutil.copy(bytes_folder / "tokenizer_config.json", tmp_path)
    tok = Tokenizer(tmp_path)
    ids, labels = chat.encode(tok, name, TURNS, blocks(3, 1), "SYS" if "SYS" in PROMPTS[name] else "")
    text = ""
    for supervised, pairs in itertools.groupby(zip(ids, labels), lambda pair: pair[1] >= 0):
        part = tok.full.decode([i for i, _ in pairs], skip_special_tokens=False)
        text += f"[[{part}]]" if supervised else part
    assert text == PROMPTS[name]

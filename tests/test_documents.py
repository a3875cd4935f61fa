"""Documents: images between the words of a text, and text alone. The loss mask, truncation, mixtures, training."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fork
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import rows as logged
from tiny_runs import run, write_data

import chat
from config import BadSample
from data import Encoder, Steps, pack
from formats.rows import conversation
from formats.tokenizer import Tokenizer
from images import ImageSpec, Layout
from kernels.cross_entropy import IGNORE
from model import VLMConfig
from parts.spans import span_ends

I, Q = 3, 4
BOTH = {"text": "A cat <image>sits. <image> It is\nred.", "images": ["0.png", "1.png"]}
TEXT = {"text": "What is this? A dog."}


def encoder(folder, template="vicuna_v1", max_len=64):
    return Encoder(Tokenizer(folder), template, Layout(I, Q), max_len, "")


def shown(tok, ids, labels):
    """-> the text of a sample; supervised runs are in [[ ]], one image is #"""
    out = ""
    for supervised, pairs in itertools.groupby(zip(ids, labels), lambda pair: pair[1] != IGNORE):
        for image, part in itertools.groupby((i for i, _ in pairs), lambda i: i == I):
            part = list(part)
            text = "#" * (len(part) // Q) if image else tok.full.decode(part, skip_special_tokens=False)
            out += f"[[{text}]]" if supervised else text
    return out


# ---- ids and mask ---------------------------------------------------------------------------------------------------

def test_all_text_is_supervised_and_no_image(bytes_folder):
    encode = encoder(bytes_folder)
    ids, labels, names, cut = encode(BOTH)
    assert shown(encode.tok, ids, labels) == "<s>[[A cat ]]#[[sits. ]]#[[ It is\nred.</s>]]"
    assert (names, cut, ids.count(I)) == (["0.png", "1.png"], 0, 2 * Q)
    assert all(y == (IGNORE if n == 0 or i == I else i) for n, (i, y) in enumerate(zip(ids, labels)))
    ids, labels, names, cut = encode(TEXT)
    assert shown(encode.tok, ids, labels) == "<s>[[What is this? A dog.</s>]]" and (names, cut) == ([], 0)


def test_images_may_begin_and_end_a_document(bytes_folder):
    encode = encoder(bytes_folder)
    row = {"text": "<image><image>two cats<image>", "images": ["0.png"] * 3}
    ids, labels, names, _ = encode(row)
    assert shown(encode.tok, ids, labels) == "<s>##[[two cats]]#[[</s>]]" and len(names) == 3
    assert encode({"text": "<image>one", "image": "0.png"})[2] == ["0.png"], "LLaVA's key, too"


def test_words_are_tokenised_as_without_images(tok_folder):
    """Each piece of text between two images keeps its characters, also with SentencePiece's dummy prefix."""
    tok = Tokenizer(tok_folder)
    ids, labels = encoder(tok_folder)(BOTH)[:2]
    pieces = [[i for i, _ in run] for text, run in itertools.groupby(zip(ids[1:-1], labels[1:-1]), lambda p: p[0] != I)
              if text]
    assert "".join(tok.decode(p) for p in pieces) == BOTH["text"].replace("<image>", "")
    assert pieces[0] == tok.text("A cat ")[0] and pieces[1] == tok.text("sits. ", first=False)[0]


# templates whose control tokens the tiny tokenizer has
@pytest.mark.parametrize("template", sorted({*chat.TEMPLATES} - {"llama_3", "chatml", "fuyu", "internvl", "idefics3"}))
def test_a_document_is_one_in_every_template(template, bytes_folder):
    assert encoder(bytes_folder, template)(BOTH) == encoder(bytes_folder)(BOTH)


def test_a_prompt_begins_a_document(tok_folder):
    """Few-shot prompts: the ids of the beginning of a document, without its end."""
    tok, blocks = Tokenizer(tok_folder), [[I] * Q] * 2
    whole, _ = chat.encode(tok, "document", [(BOTH["text"], "")], blocks)
    begin, _ = chat.encode(tok, "document", [("A cat <image>sits. <image>", None)], blocks)
    assert whole[:len(begin)] == begin and whole[-1] == tok.eos not in begin


@pytest.mark.parametrize("room, text, images", [
    (99, "<s>[[A cat ]]#[[sits. ]]#[[ It is\nred.</s>]]", 2), (-1, "<s>[[A cat ]]#[[sits. ]]#[[ It is\nred.]]", 2),
    (-8, "<s>[[A cat ]]#[[sits. ]]#", 2), (-9, "<s>[[A cat ]]#[[sits. ]]", 1)])
def test_a_document_is_cut_beside_images(room, text, images, bytes_folder):
    """At any length: whole images alone, and never more than max_len tokens."""
    whole = encoder(bytes_folder)(BOTH)[0]
    after = len(whole) - 1 - max(n for n, i in enumerate(whole) if i == I)            # tokens after the last image
    room = {-8: -after, -9: -after - 1}.get(room, room)
    encode = encoder(bytes_folder, max_len=min(64, len(whole) + room))
    ids, labels, names, cut = encode(BOTH)
    assert shown(encode.tok, ids, labels) == text and len(names) == images
    assert len(ids) + cut == len(whole) and (cut > 0) == (room < 0)
    for max_len in range(6, len(whole) + 1):
        ids, _, names, cut = encoder(bytes_folder, max_len=max_len)(BOTH)
        assert ids == whole[:len(ids)] and ids.count(I) == Q * len(names) and len(ids) + cut == len(whole)
        assert max_len - Q < len(ids) <= max_len, "as much as fits"


@pytest.mark.parametrize("row, reason", [
    ({"text": ""}, "a document is one text"), ({"text": " \n"}, "a document is one text"),
    ({"text": ["a"]}, "a document is one text"), ({"text": "a", "system": "S"}, "a document is one text"),
    ({"text": "a", "image": "0.png"}, "1 image(s) but 0 marker(s)"),
    ({"text": "<image>a<image>", "images": ["0.png"]}, "1 image(s) but 2 marker(s)"),
    ({"text": "a <image>"}, "0 image(s) but 1 marker(s)"), ({"text": "a", "images": [5]}, "neither a name nor a list"),
    ({"text": "a", "videos": ["v.mp4"]}, "video is not supported"),
    ({"text": "a", "question_id": 1}, "no conversations"), ({"text": "a", "conversations": []}, "no conversations"),
    ({"text": "<image>", "image": "0.png"}, None)])
def test_a_bad_document_says_why(row, reason, bytes_folder):
    if reason is None:                                         # an image and its end alone: EOS is supervised
        assert len(encoder(bytes_folder)(row)[0]) == 2 + Q
        return
    with pytest.raises(BadSample) as e:
        encoder(bytes_folder)(row)
    assert reason in str(e.value)


def test_a_marker_within_text_alone_is_text(bytes_folder):
    encode = encoder(bytes_folder)
    ids, labels, names, _ = encode({"text": "the tag <image> in html"})
    assert I not in ids and not names and encode.tok.decode(ids[1:-1]) == "the tag <image> in html"
    assert conversation({"text": "a", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}]
                         })[0] == [("q", "b")], "a conversation with another field `text` stays one"


# ---- mixtures -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Captions, interleaved documents and texts -> folder, spec 45 : 45 : 10"""
    folder = tmp_path_factory.mktemp("mix")
    caps = write_data(folder, "cap.jsonl", 20)
    (folder / "inter.jsonl").write_text("".join(json.dumps(
        {"id": i, "text": f"Here is <image> number {i} and <image> again" + "!" * (i % 7),
         "images": [f"{i}.png", "0.png"]}) + "\n" for i in range(12)))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"only text, number {i}" + "." * (i % 5)}) + "\n"
                                               for i in range(8)))
    return folder, f"{caps}:.45,{folder / 'inter.jsonl'}:.45,{folder / 'text.jsonl'}:.1"


def test_an_epoch_draws_exactly_the_shares(mixture, bytes_folder):
    folder, spec = mixture
    steps = Steps(spec, str(folder / "images"), encoder(bytes_folder), ImageSpec(8, "squash"), 8, 64, 0)
    assert steps.total == 40 and steps.counts.tolist() == [18, 18, 4]
    for epoch in range(3):
        drawn = Counter(f for step in range(5 * epoch, 5 * epoch + 5) for f, _ in steps.samples(step))
        assert drawn == {0: 18, 1: 18, 2: 4}, "45 %, 45 %, 10 % of 40"
    for step in range(5):
        data = steps[step]
        assert not data.dropped and len(data.names) == 8
        assert sum(len(b.images) for b in data.micro) == sum(int((b.ids == I).sum()) for b in data.micro) // Q
        assert all(b.labels[b.ids == I].ne(I).all() for b in data.micro), "no placeholder is predicted"


def settings(world, mixture, **more):
    folder, spec = mixture
    return {**world, "data": spec, "images": str(folder / "images"), "batch_size": 4, "dtype": "fp64", "steps": 4,
            "save_every": 4, **more}


def test_two_processes_train_a_mixture(world, mixture, bytes_folder, tmp_path):
    """In a step where one rank has no image, too"""
    how = settings(world, mixture)
    encode, spec = encoder(bytes_folder, max_len=48), ImageSpec(8, "squash")
    ranks = [Steps(how["data"], how["images"], encode, spec, 4, 96, 0, rank, 2) for rank in (0, 1)]
    seen = [[sum(len(b.images) for b in steps[n].micro) for steps in ranks] for n in range(4)]
    assert any(0 in images and sum(images) for images in seen), seen
    run("sft", how, tmp_path / "one")
    for parallel in ("ddp", "fsdp"):
        (tmp_path / parallel).mkdir()
        fork(2, lambda rank: run("sft", how, tmp_path / parallel / "run", parallel=parallel), tmp_path / parallel)
        one, two = (load_file(p / "checkpoints/step_0000004/trained.safetensors")
                    for p in (tmp_path / "one", tmp_path / parallel / "run"))
        assert max(((one[k] - two[k]).norm() / one[k].norm()).item() for k in one) < 1e-10
    assert all(row["dropped"] == 0 for row in logged(tmp_path / "one/log.jsonl") if "loss" in row)


FLAMINGO = ("text.model_type=flamingo text.cross_width=32 connector=perceiver tokens=1 vision.keep_class=true "
            "connector_args.latents=3 connector_args.depth=1 connector_args.heads=2 connector_args.head_dim=8")


@pytest.mark.parametrize("parts", [FLAMINGO, "mask=prefix", "mask=image", "connector=pool tokens=1"])
def test_other_systems_train_on_documents(parts, world, mixture, tmp_path):
    train = "multi_modal_projector.*=1e-3 language_model.*=1e-3"
    how = settings(world, mixture, steps=2, save_every=0, loss="sample")
    assert run("sft", how, tmp_path / "run", parts=parts, train=train, lr=3e-3) is None
    losses = [row["loss"] for row in logged(tmp_path / "run/log.jsonl") if "loss" in row]
    assert len(losses) == 2 and all(0 < x < 20 for x in losses)


def test_a_prefix_mask_keeps_documents_causal(bytes_folder):
    """The prefix of a document ends at its first supervised token, which follows BOS."""
    cfg = VLMConfig(image_token_index=I, mask="prefix")
    ids, labels, *_ = encoder(bytes_folder)(BOTH)
    b = pack([(ids, labels, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))], 8, span_ends(cfg))
    assert torch.equal(b.hi.long(), torch.arange(len(ids)) + 1)


def test_validation_asks_no_document(world, mixture, tmp_path, short_answers):
    folder, _ = mixture
    both = tmp_path / "val.jsonl"
    both.write_text((folder / "inter.jsonl").read_text() + (folder / "cap.jsonl").read_text())
    how = settings(world, mixture, steps=1, val_data=str(both), eval_every=1, sample_every=1)
    assert run("sft", how, tmp_path / "run") is None
    asked = logged(tmp_path / "run/samples.jsonl")
    assert len(asked) == 4 and all("What is this" in row["prompt"] for row in asked)
    assert any("val_loss" in row for row in logged(tmp_path / "run/log.jsonl"))


def test_the_checker_shows_documents(mixture, aligned):
    folder, _ = mixture
    words = ROOT / "data.py", folder / "inter.jsonl", "--show=1", f"--images={folder}/images", f"--model={aligned}"
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0 and "12 good, 0 dropped, 0 truncated" in done.stdout, done.stdout + done.stderr
    assert "<s>[[Here is ]][4 x image][[ number 0 and ]][4 x image][[ again</s>]]" in done.stdout
    assert "24 images" in done.stdout


def test_images_are_those_of_the_text(mixture, bytes_folder):
    """In the order of their markers"""
    folder, _ = mixture
    root = Path(folder / "images")
    for n, colour in enumerate(("red", "blue")):
        Image.new("RGB", (8, 8), colour).save(root / f"c{n}.png")
    (folder / "two.jsonl").write_text(json.dumps({"text": "<image> red <image> blue", "images": ["c0.png", "c1.png"]}))
    step = Steps(str(folder / "two.jsonl"), str(root), encoder(bytes_folder), ImageSpec(8, "squash"), 1, 64, 0)[0]
    pixels = step.micro[0].images[:, :, 0, 0].tolist()
    assert pixels == [[255, 0, 0], [0, 0, 255]]

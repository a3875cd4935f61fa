"""InstructBLIP's Q-Former: which words it reads, what they change, packed, without images, and a run of training."""

import json

import pytest
import torch
from conftest import error, example
from part_checks import check_flops, check_no_images, check_packed, config, random_model, samples
from test_model import TIGHT, gradients
from tiny_runs import refusal, run, state
from torch.utils.data._utils.pin_memory import pin_memory

from data import pack
from formats import llava
from generate import Chat
from parts.build import build
from parts.eva import EvaConfig
from parts.instruct import Instructed, Reader, placed, reader

SIZES = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, vocab_size=50,
             max_position_embeddings=16)
PARTS = ("connector=instruct tokens=3 connector_args.hidden_size=16 connector_args.num_hidden_layers=2 "
         "connector_args.num_attention_heads=2 connector_args.intermediate_size=24")


class Numbers:
    """A tokenizer whose texts are numbers"""

    def decode(self, ids):
        return " ".join(map(str, ids))

    def text(self, s):
        return [int(n) % 50 for n in s.split()], None


def instructblip():
    cfg = config(connector="instruct", tokens=3, connector_args=SIZES)
    cfg.vision = EvaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                           image_size=8, patch_size=4)
    return cfg


@pytest.fixture
def model():
    return random_model(instructblip())


def read(longest=16):
    return Reader(Numbers(), None, 3, 3, longest)


def test_the_words_are_those_before_the_first_answer():
    """Two documents: one image and a question of two words; text alone; three images and one word"""
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    docs = [([3, 3, 3, 1, 7, 8, 9, 5], [-100] * 6 + [9, 5]), ([1, 6, 7], [-100, -100, 7]),
            ([3] * 9 + [4, 5], [-100] * 10 + [5])]
    seen = read(8)(docs, pixels)
    assert seen.counts.tolist() == [6, 8, 8, 8] and seen.pixels is pixels          # 10 words are cut to 8
    assert seen.words.tolist() == [3, 3, 3, 1, 7, 8, *[3] * 8, *[3] * 8, *[3] * 8]
    assert len(seen) == 4 and len(seen[:0]) == 0 and seen.to("cpu").words.equal(seen.words)


def test_packed(model):
    check_packed(model, read(12), dead="layers.2.word_")         # the last layer changes words that nothing reads


def test_flops(model):
    check_flops(model)


def test_no_images(model):
    check_no_images(model)
    _, grads = gradients(model, [pack([example(2, images=0)], 8, reader=read())])
    assert grads.keys() == dict(model.named_parameters()).keys()


def test_each_image_has_its_own_instruction(model):
    """A stream of three images with 2, 0 and 4 words = each image alone; and another question moves only its tokens"""
    former, x = model.multi_modal_projector, torch.randn(3, 5, 32, dtype=torch.float64)
    words, counts = torch.tensor([7, 8, 1, 2, 3, 4]), torch.tensor([2, 0, 4])
    with torch.no_grad():
        together = former(x, words, counts)
        alone = [former(x[i : i + 1], w, torch.tensor([len(w)])) for i, w in enumerate(words.split([2, 0, 4]))]
        assert (together - torch.cat(alone)).abs().max() < TIGHT
        for changed in (torch.tensor([7, 8, 1, 2, 3, 9]), torch.tensor([7, 8, 1, 2, 4, 3])):      # a word; their order
            moved = (former(x, changed, counts) - together).abs().amax(-1)
            assert moved[:2].max() < TIGHT and moved[2].min() > 1e-6


def test_only_the_question_changes_the_features(model):
    ids, labels, images = samples(model.cfg)[0]
    first = next(i for i, y in enumerate(labels) if y >= 0)

    def features(ids):
        with torch.no_grad():
            return model.image_features(read(30)([(ids, labels)], images))

    true = features(ids)
    for at, moves in ((first - 1, True), (first, False), (len(ids) - 1, False)):
        other = [*ids[:at], 77, *ids[at + 1 :]]
        assert torch.equal(features(other), true) != moves


def test_words_stand_behind_the_queries_of_their_image():
    at = torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6])                       # 2 images, 2 queries, 2 and 1 words
    assert placed(torch.arange(4), 10 + torch.arange(3), at).tolist() == [0, 1, 10, 11, 2, 3, 12]


def test_images_without_words_are_images_with_empty_instructions(model):
    images, none = example(1)[2], torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(model.image_features(images), model.image_features(Instructed(images, none[:0], none)))


def test_instructions_are_pinned_and_copied_with_their_pixels(monkeypatch):
    """The loader's thread pins them, or Batch.to, which has no GPU here"""
    b = pack([([3, 3, 3, 1, 7, 9], [-100] * 5 + [9], torch.zeros(1, 3, 8, 8, dtype=torch.uint8))], 8, reader=read())
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t + 1)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device, non_blocking: to(t, "cpu"))
    for images in (pin_memory(b).images, b.to("cuda").images):
        for new, old in zip(vars(images).values(), vars(b.images).values(), strict=True):
            assert torch.equal(new, old + 1)


def test_mmca_is_refused():
    cfg = instructblip()
    cfg.mask = "mmca"
    assert "connector=instruct with a language model or mask of type 'mmca'" in error(build, cfg)


# ---- a run ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def aligned(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("instruct") / "align"
    assert run("align", world, out, parts=PARTS, workers=1) is None
    return out


def test_a_run_reads_instructions_and_resumes_bit_equal(aligned, world, tmp_path):
    """From the start, by another number of loaders; and from its checkpoint"""
    for how in (dict(workers=0), dict(resume=str(aligned / "checkpoints" / "step_0000004"))):
        out = tmp_path / str(len(how.get("resume", "")))
        assert run("align", world, out, parts=PARTS, **how) is None
        assert state(out) == state(aligned)


def test_a_run_folder_answers_by_the_question(aligned):
    """The words are those of the language model, so the folder is pumice's"""
    assert json.loads((aligned / "model" / "config.json").read_text())["model_type"] == "pumice"
    asked = Chat(aligned, "cpu", "fp64")
    assert isinstance(asked.ask(None, "What?", 4), str)
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    seen = [asked.reader([([3] * 3 + asked.tok.text(q)[0], [])], pixels) for q in ("What is this?", "Is this a cat?")]
    assert asked.tok.decode(seen[0].words.tolist()) == "What is this?"
    with torch.no_grad():
        a, b = (asked.model.image_features(x) for x in seen)
    assert a.shape == (1, 3, 32) and (a - b).abs().max() > 1e-6


def test_words_of_its_own_need_a_tokenizer(world, tmp_path):
    assert "a Q-Former of 900 words" in refusal("align", world, tmp_path / "x",
                                                parts=PARTS + " connector_args.vocab_size=900")


def test_reader_is_none_for_other_connectors(aligned):
    model, folder = llava.load_model(init=aligned)
    assert reader(folder, model.cfg).longest == 512
    model.cfg.connector = "qformer"
    assert reader(folder, model.cfg) is None

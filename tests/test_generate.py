"""Generation: with a cache as without, alone as in a batch, no state left behind; Chat from paths and from memory."""

import numpy as np
import pytest
import torch
from conftest import error, example, make_tokenizer, tiny_vlm
from PIL import Image

import sample
from config import BadSample
from data import pack
from formats import llava
from formats.tokenizer import Tokenizer
from generate import Cache, Chat, generate
from kernels.cross_entropy import IGNORE
from model import logits_head

TIGHT = 1e-12
NOTHING = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)


def prompt(seed, images=1, text=9):
    ids, _, pixels = example(seed, text=text, images=images)
    return torch.tensor(ids), pixels


def logits(model, ids, pixels):
    """Of every token of one conversation, without a cache"""
    batch = pack([(ids.tolist(), [IGNORE] * len(ids), pixels)], 8)
    with torch.no_grad():
        return model(*batch._replace(labels=torch.zeros_like(batch.ids)), head=logits_head)


@pytest.mark.parametrize("images, text", [(2, {}), (1, {"sliding_window": 5}), (0, {"qk_norm": True})],
                         ids=["llama", "window", "qwen3"])
def test_32_tokens_equal_those_without_a_cache(images, text):
    """One pass over the whole conversation must find each token the most probable one after those before it."""
    model = tiny_vlm(**text)
    ids, pixels = prompt(images, images)
    answer, = generate(model, [ids], pixels, set(), 32)
    last = logits(model, torch.cat([ids, torch.tensor(answer)]), pixels)[len(ids) - 1 : -1]
    last[:, 3] = -torch.inf                                 # the image placeholder
    assert answer == last.argmax(1).tolist() and len(answer) == 32 and len(set(answer)) > 2


def test_logits_equal_those_without_a_cache():
    """A conversation token by token through the cache, in float64, at every position."""
    model, (ids, pixels) = tiny_vlm(), prompt(1)
    true, cache, got = logits(model, ids, pixels), Cache(1, len(ids)), []
    head = 6                                            # BOS, four placeholders and a token at once, then one by one
    with torch.no_grad():
        for a, b in [(0, head), *((i, i + 1) for i in range(head, len(ids)))]:
            pos = cache.slot = torch.arange(a, b)
            got.append(model(ids[a:b], 0 * pos, pos, 0 * pos.int(), pos.int() + 1, pixels if a == 0 else NOTHING,
                             head=logits_head, cache=cache))
    torch.testing.assert_close(torch.cat(got), true, rtol=TIGHT, atol=TIGHT)


def test_a_batch_answers_as_each_alone():
    """Five prompts of different lengths with 0, 1, 2, 1, 0 images; one answer stops early."""
    model = tiny_vlm()
    asked = [prompt(1, 0, 3), prompt(2, 1, 12), prompt(3, 2, 5), prompt(4, 1, 1), prompt(5, 0, 20)]
    alone = [generate(model, [ids], pixels, set(), 10)[0] for ids, pixels in asked]
    stop = alone[1][3]
    alone = [a[: a.index(stop)] if stop in a else a for a in alone]
    together = generate(model, [ids for ids, _ in asked], torch.cat([p for _, p in asked]), {stop}, 10)
    assert together == alone
    assert len(alone[1]) <= 3 and max(len(a) for a in alone) == 10 and len({*map(tuple, alone)}) == 5


def test_a_group_shares_its_prompt():
    """Three prompts of different lengths, four answers each. Tokens are those of four copies of each prompt"""
    model, prompts = tiny_vlm(), [prompt(1, 0, 3), prompt(2, 1, 12), prompt(3, 2, 5)]
    images, calls = torch.cat([p for _, p in prompts]), []
    hook = model.vision_tower.register_forward_hook(lambda m, i, o: calls.append(len(i[0])))
    free = generate(model, [ids for ids, _ in prompts], images, set(), 6, 1.0, group=4)
    hook.remove()
    assert calls == [3, 0, 0, 0, 0, 0], "each image once"
    stop = free[5][2]
    assert generate(model, [ids for ids, _ in prompts for _ in range(4)],
                    torch.cat([p for _, p in prompts for _ in range(4)]), set(), 6, 1.0) == free
    assert len({*map(tuple, free)}) == 12
    some = generate(model, [ids for ids, _ in prompts], images, {stop}, 6, 0.0, group=4)
    assert some == [a for a in generate(model, [i for i, _ in prompts], images, {stop}, 6) for _ in range(4)]


def test_an_answer_ends_before_a_stop_token():
    model, (ids, pixels) = tiny_vlm(), prompt(1)
    free = generate(model, [ids], pixels, set(), 8)[0]
    stop = free[5]
    assert generate(model, [ids], pixels, {stop}, 8)[0] == free[: free.index(stop)]
    assert generate(model, [ids], pixels, {free[0]}, 8) == [[]]
    assert generate(model, [ids], pixels, set(), 0) == [[]]
    assert generate(model, [], NOTHING, {2}) == []


def test_each_sees_every_step_and_ends_it():
    """Two prompts, of which one ends early: `each` sees its stop token, the caller does not. True ends generation."""
    model, (ids, pixels), (short, _) = tiny_vlm(), prompt(1), prompt(2, 0, 3)
    free = generate(model, [ids, short], pixels, set(), 5)
    stop, seen = free[0][2], []
    assert stop not in free[0][:2] + free[1]
    ended = generate(model, [ids, short], pixels, {stop}, 5, each=lambda a: seen.append([[*x] for x in a]))
    assert ended == [free[0][:2], free[1]]
    assert seen == [[free[0][: min(n, 3)], free[1][:n]] for n in range(1, 6)]
    assert generate(model, [ids], pixels, set(), 5, each=lambda a: len(a[0]) == 2) == [free[0][:2]]


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_banned_ids_are_never_generated(temperature):
    """All but ten ids are banned, among them the free answer's."""
    model, (ids, pixels) = tiny_vlm(), prompt(1)
    free = set(generate(model, [ids], pixels, set(), 12, temperature)[0])
    allowed = set(range(100, 110)) - free
    answer = generate(model, [ids], pixels, set(), 12, temperature, banned=set(range(512)) - allowed)[0]
    assert set(answer) <= allowed and len(answer) == 12


def test_the_image_placeholder_is_never_generated():
    """A placeholder without an image would be an error in the next pass, so it is always banned."""
    model, (ids, pixels) = tiny_vlm(), prompt(1)
    answers = generate(model, [ids] * 30, torch.cat([pixels] * 30), set(), 8, 1e3, banned=range(6, 512))
    assert {i for a in answers for i in a} == {0, 1, 2, 4, 5}    # at this temperature every other id occurs


def test_sampling_follows_seed_and_temperature():
    model, (ids, pixels) = tiny_vlm(), prompt(1)
    one, same, other = (generate(model, [ids], pixels, set(), 8, 1.0, seed=s) for s in (0, 0, 1))
    assert one == same != other
    assert generate(model, [ids], pixels, set(), 8, 1e-6) == generate(model, [ids], pixels, set(), 8)


def test_sampled_tokens_follow_the_softmax():
    """500 draws of one token: each share lies within five standard deviations of its probability."""
    model, (ids, pixels) = tiny_vlm(), prompt(1, 0)
    n = 500
    answers = generate(model, [ids[:4]] * n, NOTHING, set(), 1, 0.7, banned=range(8, 512))
    share = torch.bincount(torch.tensor(answers).flatten(), minlength=512)[:8].double() / n
    last = logits(model, ids[:4], pixels)[-1, :8]
    last[3] = -torch.inf
    p = (last / 0.7).softmax(0)
    assert ((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-9).all() and (p > 0.01).sum() > 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_modes_and_random_state_stay(temperature):
    """Also if one part has another mode than the rest, and if generation fails."""
    model, (ids, pixels) = tiny_vlm(), prompt(1)
    model.train()
    model.vision_tower.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    seen, look = [], lambda m, i, o: seen.append((m.training, torch.is_grad_enabled()))
    hook = model.language_model.register_forward_hook(look)
    generate(model, [ids], pixels, set(), 4, temperature)
    hook.remove()
    assert seen == [(False, False)] * 4
    assert {n: m.training for n, m in model.named_modules()} == modes and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(IndexError):
        generate(model, [torch.tensor([99999])], NOTHING, set(), 4)
    assert {n: m.training for n, m in model.named_modules()} == modes


# ---- Chat -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole LLaVA folder around a random model in fp64"""
    root = tmp_path_factory.mktemp("chat")
    model, tok = tiny_vlm(), Tokenizer(make_tokenizer(root / "tok"))
    pre = {"crop_size": {"height": 8, "width": 8}, "size": {"shortest_edge": 8}, "image_mean": [0.5] * 3}
    vision, text = {"model_type": "clip_vision_model", "hidden_size": 32}, {"model_type": "llama"}
    source = llava.Folder(tok, vision, text, pre, {}, {})
    llava.save_model(root / "model", model.state_dict(), model.cfg, source, "chatml", "Be brief.", "pad",
                     torch.float64, "")
    noise = np.random.default_rng(0).integers(0, 256, (3, 14, 9, 3), dtype=np.uint8)
    for name, pixels in zip("abc", noise):
        Image.fromarray(pixels).save(root / f"{name}.png")
    (root / "broken.png").write_bytes(b"no image")
    (root / "cut.png").write_bytes((root / "a.png").read_bytes()[:200])
    return root


@pytest.fixture(scope="module")
def chat(folder):
    return Chat(folder / "model", "cpu", "fp64")


def test_path_image_and_script_give_the_same_answer(folder, chat, capsys):
    file, question = folder / "a.png", "What is this?"
    answer = chat.ask(file, question, 8)
    assert answer == chat.ask(str(file), question, 8) == chat.ask(Image.open(file), question, 8)
    assert answer == chat.ask([file], question, 8)
    assert answer and answer != chat.ask(folder / "b.png", question, 8)
    assert capsys.readouterr() == ("", "")
    sample.main(sample.Settings(str(folder), str(file), question, max_new_tokens=8, device="cpu", dtype="fp64"))
    assert capsys.readouterr().out == answer + "\n"


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "I", "F", "CMYK", "LA"])
def test_any_image_mode_becomes_rgb(folder, chat, mode):
    """A PIL image in memory gives the pixels that its file gives."""
    image = Image.open(folder / "a.png").convert("L" if mode in "IF" else mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert(mode)
    file = folder / f"{mode}.{'tiff' if mode in ('F', 'CMYK', 'I') else 'png'}"
    image.save(file)
    pixels, = chat.look([image])[0]
    assert pixels.shape == (1, 3, 8, 8) and pixels.dtype == torch.uint8 and torch.equal(pixels, chat.look([file])[0][0])


def test_images_arrive_in_their_order(folder, chat):
    a, b = folder / "a.png", Image.open(folder / "b.png")
    asked = "One <image> and <image> two?"
    ids = chat.prompt([(asked, None)], [chat.layout.block()] * 2)
    pixels = torch.cat(chat.look([a, b])[0])
    true = generate(chat.model, [ids], pixels, chat.stop_ids, 8, banned=chat.banned)[0]
    assert chat.ask([a, b], asked, 8) == chat.tok.decode(true).strip() != chat.ask((b, a), asked, 8)
    assert chat.ask([a, b], "Same?", 8) == chat.ask([a, b], "<image>\n<image>\nSame?", 8)


def test_text_alone_needs_no_image(chat):
    ids = chat.prompt([("Hi!", None)])
    assert chat.cfg.image_token_index not in ids.tolist()
    true = generate(chat.model, [ids], NOTHING, chat.stop_ids, 8, banned=chat.banned)[0]
    assert chat.ask(None, "Hi!", 8) == chat.ask([], "Hi!", 8) == chat.tok.decode(true).strip()


def test_sampling_settings_reach_generate(chat):
    hot = [chat.ask(None, "Hi!", 8, temperature=2.0, seed=s) for s in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2] and hot[0] != chat.ask(None, "Hi!", 8)
    assert len(chat.ask(None, "Hi!", 1)) < len(chat.ask(None, "Hi!", 8))


def test_wrong_images_are_one_line_errors(folder, chat):
    for images, text, reason in (("gone.png", "?", "image cannot be read: 'gone.png' (FileNotFoundError)"),
                                 (folder, "?", "(IsADirectoryError)"),
                                 (folder / "broken.png", "?", "image cannot be read: 'broken.png'"),
                                 (Image.open(folder / "cut.png"), "?", "image cannot be read: PngImageFile (OSError)"),
                                 (np.zeros((8, 8, 3)), "?", "image cannot be read: ndarray (AttributeError)"),
                                 (folder / "a.png", "<image> <image>?", "image")):
        with pytest.raises(BadSample) as e:
            chat.ask(images, text, 1)
        assert reason in str(e.value) and "\n" not in str(e.value)


def test_wrong_folders_are_one_line_errors(folder, tmp_path):
    assert "model is empty" in error(Chat, "")
    assert "no such" in error(Chat, tmp_path / "gone")
    assert "device=tpu" in error(Chat, folder, "tpu") and "dtype=int8" in error(Chat, folder, "cpu", "int8")
    assert "unknown template 'x'" in error(Chat, folder, "cpu", template="x")




def test_a_folder_without_template_is_noted(folder, tmp_path, capsys):
    (tmp_path / "m").mkdir()
    for file in (folder / "model").iterdir():
        if file.name != "pumice.json":
            (tmp_path / "m" / file.name).symlink_to(file)
    chat = Chat(tmp_path / "m", "cpu")
    out, err = capsys.readouterr()
    assert chat.template == "vicuna_v1" and not out and "does not say with which template it was trained" in err
    chat = Chat(folder, "cpu", template="plain", system="")
    assert (chat.template, chat.system, capsys.readouterr()) == ("plain", "", ("", ""))

"""Our GGUF files in llama.cpp itself: the same logits, ids, prompts and answers. Needs its Python build
(pip install xllamacpp: Linux wheels, no compiler); measured with xllamacpp 2026.10.11549.

llama.cpp's GELU is a table in fp16 of the tanh approximation, so logits agree less closely with images than without.
"""

import base64
import functools
import io
import json
import random
import urllib.request

import pytest
import torch
from PIL import Image
from test_gguf import LLAMA_3, QWEN, SMOL, folder, make_pieces, respecified
from test_llava import FAMILIES, configure
from test_model import all_logits

from data import pack
from formats import gguf as gguf_export, llava
from formats.tokenizer import Tokenizer
from generate import Chat, generate

llama = pytest.importorskip("xllamacpp")
IDS = [1, *torch.randint(12, 480, (20,), generator=torch.Generator().manual_seed(0)).tolist()]


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory, bytes_folder):
    return folder("clip + llama", tmp_path_factory.mktemp("llama_cpp") / "llava", bytes_folder)


class Server:
    def __init__(self, model, mmproj=""):
        p = llama.CommonParams()
        p.model.path, p.mmproj.path = str(model), str(mmproj)
        p.n_ctx, p.n_parallel, p.n_gpu_layers, p.cpuparams.n_threads, p.warmup = 512, 1, 0, 1, False
        p.cache_type_k = p.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED   # would round to fp16
        self.server = llama.Server(p)
        with urllib.request.urlopen(self.server.listening_address + "/props", timeout=60) as answer:
            self.marker = json.load(answer)["media_marker"]                              # its image marker: random

    def post(self, path, **body):
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def logprobs(self, prompt, V=512):
        """Log-probabilities of the next token -> (V,)"""
        found = self.post("/completion", prompt=prompt, n_predict=1, n_probs=V, temperature=0, cache_prompt=False,
                          logit_bias=[[20, 100.0]])  # a token that is not an end of turn: those have none
        out = torch.full((V,), -float("inf"))
        for t in found["completion_probabilities"][0]["top_logprobs"]:
            out[t["id"]] = t["logprob"]
        return out

    def ids(self, text):
        return self.post("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]


def ours(model, ids, images=torch.zeros(0, 3, 8, 8, dtype=torch.uint8)):
    with torch.no_grad():
        return all_logits(model, pack([(ids, ids, images)], 8))[-1].log_softmax(-1)


def distance(a, b):
    """Total variation between two distributions: 0 to 1"""
    return (a.exp() - b.exp()).abs().sum().item() / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_the_language_model_gives_equal_logits(name, tmp_path, bytes_folder):
    folder(name, tmp_path / "m", bytes_folder)
    model, _ = llava.load_model(init=tmp_path / "m")
    ids = IDS[:4] if "window" in name else IDS
    found = Server(gguf_export.export(tmp_path / "m", "", "f32")[0]).logprobs(ids)
    assert (found - ours(model, ids)).abs().max() < 2e-5


def texts(n=150):
    r = random.Random(0)
    alphabet = "aAbetTh  \n\n\t.,'!?:09123éß猫🦙▁"
    lines = ["What is this?", " two  spaces ", "it's 1234 cats\n\n  yes", "a\u00a0b\r\nc", "<0x0A> [INST] ▁",
             "'S 'll\tx"]
    return lines + ["".join(r.choices(alphabet, k=r.randint(1, 30))) for _ in range(n)]


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "qwen2", "smollm", "pieces"])
def test_text_becomes_the_same_ids(kind, llava_folder, tmp_path):
    def change(spec):
        spec["pre_tokenizer"] = {"llama-bpe": LLAMA_3, "qwen2": QWEN, "smollm": SMOL}.get(kind, spec["pre_tokenizer"])
        spec["model"]["ignore_merges"] = kind == "llama-bpe"
    model, source = llava.load_model(init=llava_folder)
    tok = make_pieces(tmp_path / "t")[1] if kind == "pieces" else respecified(None, tmp_path / "t", change)
    keys = gguf_export.text_keys(model.cfg.text, "f32", "x") | gguf_export.tokenizer_keys(tok, 512, None)
    tensors = functools.partial(gguf_export.text_tensors, model.language_model, model.cfg.text, "f32")
    gguf_export.write_gguf(tmp_path / "m.gguf", keys, tensors)
    server = Server(tmp_path / "m.gguf")
    assert not [t for t in texts() if server.ids(t) != tok.text(t)[0]]
    ids = [tok.id("<s>"), *tok.text("USER: ")[0], tok.id("<image>"), *tok.text("\nWhat")[0]]
    assert server.ids("<s>USER: <image>\nWhat") == ids


def make_image(seed):
    """-> (3, 8, 8) uint8, the same as a PNG in base64; of the vision tower's size, so it is not resized"""
    x = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    out = io.BytesIO()
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(out, "PNG")
    return x, base64.b64encode(out.getvalue()).decode()


def class_token_last(model):
    """CLIP as llama.cpp computes it since its #13321 (issue 25814): patches, then the class token; positions in that
    order; then the first row is dropped as if it were the class token."""
    e = model.vision_tower.vision_model.embeddings

    def forward(images):
        cls, position = e.class_embedding, e.position_embedding.weight
        e.class_embedding, e.position_embedding.weight = None, torch.nn.Parameter(torch.zeros_like(position[1:]))
        x = type(e).forward(e, images)
        e.class_embedding, e.position_embedding.weight = cls, position
        return torch.cat([x, cls.expand(len(x), 1, -1)], 1) + position
    e.forward = forward


@pytest.mark.parametrize("name", ["siglip", "clip + llama", "clip with exact gelu"])
@torch.no_grad()
def test_logits_are_equal_but_for_the_class_token(name, tmp_path, bytes_folder):
    folder(name, tmp_path / "m", bytes_folder)
    model, source = llava.load_model(init=tmp_path / "m")
    tok = source.tok
    server = Server(*gguf_export.export(tmp_path / "m", "", "f32")[:2])
    (x, a), (_, b) = make_image(1), make_image(2)
    found, other = (server.logprobs({"prompt_string": f"<s>USER: {server.marker}\nWhat", "multimodal_data": [p]})
                   for p in (a, b))
    ids = [tok.id("<s>"), *tok.text("USER: ")[0], *[3] * 4, *tok.text("\nWhat")[0]]
    right = ours(model, ids, x[None])
    assert distance(other, right) > 0.1, "the image matters"
    if name == "siglip":
        assert distance(found, right) < 1e-3
    else:                                       # once this fails, llama.cpp is fixed: change gguf.differences
        assert distance(found, right) > 0.1
        class_token_last(model)
        assert distance(found, ours(model, ids, x[None])) < 1e-3


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("template", ["vicuna_v1", "llava_llama_2", "llama_3", "chatml", "mistral"])
def test_a_chat_gives_our_prompt_and_answer(template, kind, tmp_path, bytes_folder):
    tok = bytes_folder
    if kind == "pieces":
        if template in ("llama_3", "chatml"):
            pytest.skip("needs tokens that no SentencePiece model has")
        tok = respecified(make_pieces(tmp_path / "tok")[1], tmp_path / "pieces", lambda spec: None).folder
    configure(folder("siglip", tmp_path / "m", tok), image_token_index=Tokenizer(tok).image)
    model, source = llava.load_model(init=tmp_path / "m")
    cfg = model.cfg
    llava.save_model(tmp_path / "run", model.state_dict(), cfg, source, template, "Be brief.", "pad", torch.float32)
    chat = Chat.of(*llava.load_model(init=tmp_path / "run"), template, "Be brief.", "pad")
    server = Server(*gguf_export.export(tmp_path / "run", "", "f32")[:2])
    x, png = make_image(1)
    see = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}]
    ask = [{"type": "text", "text": "What is this?"}]
    for content, turns in ((see + ask, ["<image>\nWhat is this?"]), (ask + see, ["<image>\nWhat is this?"]),
                           ("Hi", ["Hi"])):
        messages = [{"role": "user", "content": content}]
        prompt = server.post("/apply-template", messages=messages)["prompt"].replace(server.marker, "<image>")
        ids = [j for i in server.ids(prompt) for j in ([i] * 4 if i == cfg.image_token_index else [i])]
        assert ids == chat.prompt([(turns[0], None)], [chat.layout.block()] * (len(turns[0]) > 2)).tolist(), prompt
    asked = {"prompt_string": prompt.replace("Hi", f"{server.marker}\nHi"), "multimodal_data": [png]}
    found = server.post("/completion", prompt=asked, n_predict=6, temperature=0, return_tokens=True)["tokens"]
    want = generate(model, [chat.prompt([("<image>\nHi", None)], [chat.layout.block()])], x[None], set(), 6)[0]
    assert found == want[:len(found)] and (len(found) == 6 or want[len(found)] in source.tok.specials.values())

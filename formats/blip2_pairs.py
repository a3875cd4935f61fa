"""Folders of BLIP-2's first stage: vision tower, Q-Former with words, heads, tokenizer. Made new, read, written.

A folder of ours has model_type "pumice_blip2" and our names, with the tower's as in CLIP. --vision=FOLDER of
train_align.py reads the tower and the Q-Former of such a folder, without the words. transformers'
Blip2ForImageTextRetrieval is read, too; its temperature is not in its folder and begins again at 0.07.
"""

import dataclasses
import json
from pathlib import Path

import torch

from config import stop
from formats.blip2 import QFORMER, TOWER
from formats.configs import one_line, read_config, read_pre, typed, vision_config
from formats.family import image_settings, read_names
from formats.hub import find_folder, find_model
from formats.pairs import FILES, PairFolder, Words, fitted, with_ends
from formats.sentencepiece import added_token
from formats.tensors import read_tensors, tensor_digest, write_shards
from formats.tokenizer import read_spec, vocabulary
from formats.whole import commit, write_file
from parts.blip2 import TEMPERATURE, Blip2, Blip2Config
from parts.init import init_new
from parts.instruct import InstructConfig
from parts.settings import apply_parts

KIND, DEC = "pumice_blip2", "[DEC]"
LAYER = r"^multi_modal_projector\.layers\.(\d+)\."
NAMES = [(r"^multi_modal_projector\.(word|position)_embedding", r"embeddings.\1_embeddings"),
         (rf"{LAYER}word_fc1", r"qformer.encoder.layer.\1.intermediate.dense"),
         (rf"{LAYER}word_fc2", r"qformer.encoder.layer.\1.output.dense"),
         (rf"{LAYER}word_norm", r"qformer.encoder.layer.\1.output.LayerNorm")] + TOWER + QFORMER


@one_line("config.json of BLIP-2's first stage")
def blip2_pairs_config(c, pre, dec):
    """config.json of our folder or of transformers' -> Blip2Config"""
    v, q = dict(c.get("vision_config") or {}), c.get("qformer_config") or {}
    if c["model_type"] == "blip-2":
        v |= {"model_type": "blip_2_vision_model"}
        if not q.get("use_qformer_text_input"):
            stop("a BLIP-2 whose Q-Former reads no words (use_qformer_text_input=false) is not a first stage")
    vision = vision_config(v, -1, pre)
    vision.feature_norm = vision.keep_class = True
    return Blip2Config("blip2", vision, typed(InstructConfig, "Q-Former", {"vocab_size": 30522} | q),
                       c.get("num_query_tokens", 32), c.get("image_text_hidden_size", 256), dec)


def dec_id(spec, folder):
    ids = vocabulary(spec)
    return ids[DEC] if DEC in ids else stop(f"{folder}: the tokenizer of BLIP-2's first stage has the token {DEC}")


def load_blip2(init="", tokenizer="", vision="", parts="", seed=0):
    """Read a folder of the first stage, or make a new Q-Former for a vision tower -> Blip2, PairFolder. tokenizer,
    vision, parts: as in pairs.load_pairs"""
    if init:
        at = find_model(init)
        c, pre = read_config(at), image_settings(at)
        if c.get("model_type") not in (KIND, "blip-2"):
            stop(f"{at} holds a {c.get('model_type')!r}, no first stage of BLIP-2")
        spec, names = read_spec(at)
        cfg, tensors = blip2_pairs_config(c, pre, dec_id(spec, at)), read_tensors(at)
        files, note = {name: (at / name).read_bytes() for name in FILES if (at / name).is_file()}, []
    else:
        if not vision:
            stop("kind=blip2 needs a vision tower: --vision=FOLDER")
        at, look = find_folder(tokenizer), find_folder(vision)
        v = read_config(look)
        v = v.get("vision_config_dict") or v.get("vision_config") or v
        pre = read_pre(look, v.get("model_type", "clip_vision_model"))
        spec, names, note = with_ends(*read_spec(at), "blip2")
        spec["added_tokens"].append(added_token(max(vocabulary(spec).values()) + 1, DEC))
        cfg = Blip2Config(vision=vision_config(v, -1, pre), dec=vocabulary(spec)[DEC])
        cfg.vision.feature_norm = cfg.vision.keep_class = True
        cfg.qformer.vocab_size = -(-(cfg.dec + 1) // 64) * 64
        cfg.qformer.max_position_embeddings = 48
        apply_parts(cfg, parts, {})
        tensors = {k: x for k, x in read_tensors(look).items() if not k.endswith(".position_ids")}
        tensors = {k if k.startswith("vision_model.") else f"vision_model.{k}": x for k, x in tensors.items()}
        files = {"tokenizer.json": json.dumps(spec, ensure_ascii=False, indent=1).encode(),
                 "tokenizer_config.json": json.dumps(names, indent=1).encode()}
    with torch.device("meta"):
        model = Blip2(cfg)
    want, where, new = model.state_dict(), init or vision, {"temperature"}
    if init and c["model_type"] == "blip-2":
        tensors = read_names(tensors, want, NAMES, where)
    else:
        tensors = {f"vision_tower.{k}" if k.startswith("vision_model.") else k: x for k, x in tensors.items()}
        if not init:
            tensors = {k: x for k, x in tensors.items() if k in want}
            new = {k for k in want if not k.startswith("vision_tower.")}
        else:
            new = set()
    digests = {k: tensor_digest(x) for k, x in tensors.items()}
    tensors = fitted(tensors, {k: x.shape for k, x in want.items() if k not in new}, where)
    model.load_state_dict(tensors, strict=False, assign=True)
    init_new(model, new, seed)
    if "temperature" in new:
        model.temperature = torch.nn.Parameter(torch.full((1,), TEMPERATURE))
    if not init:                                               # as BERT's: words are also predicted by these embeddings
        for table in (model.multi_modal_projector.word_embedding, model.multi_modal_projector.position_embedding):
            table.weight.data.mul_(0.02)
    words = Words(spec, cfg.qformer.max_position_embeddings, None)
    return model, PairFolder(words, {}, pre, files, digests, note)


def save_blip2(out, state, cfg, folder, dtype=torch.float16, card=""):
    """Write a complete folder, or nothing after an error. state: {name: tensor}"""
    tensors = {k.removeprefix("vision_tower."): x for k, x in state.items()}
    if bad := next((k for k, x in tensors.items() if not x.to(dtype).isfinite().all()), None):
        stop(f"{out}: {bad} is not finite in {dtype} and is not published")
    config = {"architectures": ["pumice.Blip2"], "model_type": KIND, "vision_config": dataclasses.asdict(cfg.vision),
              "qformer_config": dataclasses.asdict(cfg.qformer), "num_query_tokens": cfg.tokens,
              "image_text_hidden_size": cfg.width, "torch_dtype": str(dtype).removeprefix("torch.")}

    def fill(tmp):
        write_shards(tmp, tensors, dtype)
        for name, content in {"config.json": config, "preprocessor_config.json": folder.pre, "README.md": card}.items():
            write_file(tmp / name, content)
        for name, content in folder.files.items():
            (tmp / name).write_bytes(content)

    commit(Path(out), fill)

"""Folders of CLIP and SigLIP, both towers: read, written, and made new. transformers: CLIPModel, SiglipModel.

The names of the tensors are ours already. The tokenizer is not changed: its own post-processor writes BOS and EOS. CLIP
counts on one trap: where config.json says eos_token_id=2, transformers takes the token with the highest id for EOS.
So a new CLIP whose tokenizer has EOS at id 2 gets another one, <|endoftext|>, behind its vocabulary.

    CLIP      texts have their own length, at most max_position_embeddings with BOS and EOS
    SigLIP    texts are filled up, or cut, to max_position_embeddings
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch

from config import stop
from formats.configs import one_line, read_config, read_pre, typed, vision_config
from formats.hub import find_folder, find_model
from formats.metadata import PROCESSORS
from formats.names import FLOATS
from formats.sentencepiece import added_token
from formats.tensors import read_tensors, tensor_digest, write_shards
from formats.tokenizer import read_spec, token_text, vocabulary
from formats.whole import commit, write_file
from parts.init import init_weights
from parts.pairs import SCALES, Pairs, PairsConfig
from parts.settings import apply_parts
from parts.text_tower import TextTowerConfig

NAMES = {"clip": ("CLIPModel", "CLIPProcessor"), "siglip": ("SiglipModel", "SiglipProcessor")}
USUAL = {"clip": {}, "siglip": dict(vocab_size=32000, hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                                    max_position_embeddings=64, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)}
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
         "spiece.model")                     # of a tokenizer; a published folder has some of them
IGNORED = (".embeddings.position_ids",)      # computed tables in old files
END = "<|endoftext|>"
# a new model; --parts changes it. The sizes are those of the toy world
NEW = dict(vision=dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                       image_size=72, patch_size=12),
           text=dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
                     max_position_embeddings=48), width=128)


class Words:
    """The tokenizer of a text tower, as its folder has it: text -> ids with BOS and EOS, cut, and filled up in SigLIP.
    What a user types never becomes a control token."""

    def __init__(self, spec, length, pad):
        """pad: id that fills a text up to `length`; None: texts keep their own length"""
        self.length, self.pad = length, pad
        self.state = json.dumps(spec | {"truncation": None, "padding": None})
        self.__setstate__(vars(self))
        if len(self.encode("?")) < 2:
            stop("the tokenizer of a text tower must write EOS behind a text (post_processor of tokenizer.json)")

    def __getstate__(self):
        return {k: x for k, x in vars(self).items() if k not in ("whole", "cut")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.whole, self.cut = (tokenizers.Tokenizer.from_str(self.state) for _ in range(2))
        self.whole.encode_special_tokens = self.cut.encode_special_tokens = True
        self.cut.enable_truncation(self.length)

    def encode(self, text):
        """-> ids"""
        ids = self.cut.encode(text).ids
        return ids + [self.pad] * (self.length - len(ids)) if self.pad is not None else ids

    def lost(self, text):
        """-> how many tokens of a text encode() cuts off"""
        return max(0, len(self.whole.encode(text).ids) - self.length)

    def decode(self, ids):
        return self.whole.decode(ids, skip_special_tokens=True)


class PairFolder(NamedTuple):
    """What a folder holds besides the weights."""
    words: Words
    config: dict                # config.json, as published
    pre: dict                   # preprocessor_config.json
    files: dict                 # {file name: bytes} of the tokenizer
    digests: dict = {}          # {name: tensor_digest(tensor)}
    notes: list = []            # lines for the user


# ---- in -------------------------------------------------------------------------------------------------------------

def text_tower_config(c, kind):
    """text_config of config.json -> TextTowerConfig, width of the text vector"""
    c = USUAL[kind] | {k: x for k, x in c.items() if x is not None} | {"model_type": f"{kind}_text_model"}
    cfg = typed(TextTowerConfig, "text tower", c)
    return cfg, c.get("projection_size", cfg.hidden_size)


@one_line("config.json of CLIP or SigLIP")
def pairs_config(c, pre):
    """config.json, preprocessor_config.json -> PairsConfig"""
    kind = c["model_type"]
    v, t = ({**(c.get(f"{name}_config") or {}), **(c.get(f"{name}_config_dict") or {})} for name in ("vision", "text"))
    text, width = text_tower_config(t, kind)
    if not v.get("vision_use_head", True):
        stop("SigLIP without its pooling head (vision_use_head=false) has no vector of an image")
    return PairsConfig(kind, vision_config(v | {"model_type": f"{kind}_vision_model"}, -1, pre), text,
                       c.get("projection_dim", 512) if kind == "clip" else width)


def pad_id(folder, kind, spec, names):
    """-> id with which SigLIP fills up texts, None for CLIP"""
    if kind == "clip":
        return None
    pad = vocabulary(spec).get(token_text(names.get("pad_token")))
    return pad if pad is not None else stop(f"{folder}: the tokenizer of SigLIP fills texts up, but has no pad_token")


def load_pairs(init="", kind="clip", tokenizer="", vision="", parts="", seed=0):
    """Read a folder of CLIP or SigLIP, or make a new model of this kind -> Pairs, PairFolder

    tokenizer    folder with the tokenizer of a new model
    vision       folder of the vision tower of a new model; empty: it is new, too
    parts        sizes of a new model (parts/settings.py)"""
    if init:
        at = find_model(init)
        c = read_config(at)
        if c.get("model_type") not in NAMES:
            stop(f"{at} holds a {c.get('model_type')!r}: clip and siglip have two towers")
        kind, pre = c["model_type"], read_pre(at, f"{c['model_type']}_vision_model")
        cfg, tensors = pairs_config(c, pre), read_tensors(at)
        tensors = {k: x for k, x in tensors.items() if not k.endswith(IGNORED)}
        spec, names = read_spec(at)
        files = {name: (at / name).read_bytes() for name in FILES if (at / name).is_file()}
        folder = PairFolder(Words(spec, cfg.text.max_position_embeddings, pad_id(at, kind, spec, names)), c, pre, files)
    else:
        cfg, folder, tensors = new_pairs(kind, tokenizer, vision, parts)
    with torch.device("meta"):
        model = Pairs(cfg)
    want = {k: x.shape for k, x in model.state_dict().items()}
    if not init:
        new = Pairs(cfg)
        init_pairs(new, seed)
        lost = [k for k in want if k.startswith("vision_model.") and ".head." not in k and k not in tensors]
        if vision and lost:
            stop(f"{vision}: {len(lost)} tensor(s) missing, the first is {lost[0]}")
        tensors = new.state_dict() | {k: x for k, x in tensors.items() if k in want}
    tensors = {k: x.view(1) if x.ndim == 0 else x for k, x in tensors.items()}                 # CLIP's logit_scale
    tensors = fitted(tensors, want, init or vision)
    model.load_state_dict(tensors, assign=True)
    digests = {k: tensor_digest(x) for k, x in tensors.items()}
    return model, folder._replace(digests=digests)


def fitted(tensors, want, where):
    """-> {name: tensor}, if the names and shapes are those of want, {name: shape}. Else stop."""
    for name, keys in (("missing", want.keys() - tensors.keys()), ("unexpected", tensors.keys() - want.keys())):
        if keys:
            stop(f"{where}: {len(keys)} {name} tensor(s), the first is {min(keys)}")
    for k, x in tensors.items():
        if x.shape != want[k] or x.dtype not in FLOATS:
            stop(f"{where}: {k} is {x.dtype} {tuple(x.shape)}, the config says {tuple(want[k])}")
        if not all(v.isfinite() for v in x.aminmax()):
            stop(f"{where}: {k} holds values that are not finite")
    return tensors


def init_pairs(model, seed):
    """First weights: those of parts/init.py, but as in CLIP's code the last matrices of attention and MLP in a tower of
    L blocks are N(0, 1/sqrt(2 L fan in)). With zeros, an image would begin as a constant and a text as its length. The
    scale and the bias of the logits are those of the papers."""
    init_weights(model, seed)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        for tower, c in ((model.vision_model, model.cfg.vision), (model.text_model, model.cfg.text)):
            for name, p in tower.named_parameters():
                if name.endswith(("out_proj.weight", "fc2.weight", "probe")):
                    p.normal_(0, (2 * c.num_hidden_layers * p.shape[-1]) ** -0.5)
        scale, bias = SCALES[model.cfg.kind]
        model.logit_scale.fill_(scale)
        if model.logit_bias is not None:
            model.logit_bias.fill_(bias)


def new_pairs(kind, tokenizer, vision, parts):
    """-> PairsConfig, PairFolder, {name: tensor} of the vision tower if a folder has it"""
    look = dict(NEW["vision"], model_type=f"{kind}_vision_model")
    cfg, tensors, pre = PairsConfig(kind, vision_config(look, -1), width=NEW["width"]), {}, {}
    cfg.text = text_tower_config(NEW["text"], kind)[0]
    if vision:
        at = find_folder(vision)
        v = read_config(at)
        v = v | (v.get("vision_config_dict") or v.get("vision_config") or {})
        pre = read_pre(at, f"{kind}_vision_model")
        cfg.vision = vision_config(v | {"model_type": f"{kind}_vision_model"}, -1, pre)
        tensors = {k.removeprefix("vision_model."): x for k, x in read_tensors(at).items()}
        tensors = {f"vision_model.{k}": x for k, x in tensors.items() if not f"x.{k}".endswith(IGNORED)}
    at = find_folder(tokenizer)
    spec, names = read_spec(at)
    spec, names, note = with_ends(spec, names, kind)
    cfg.text.vocab_size = -(-(max(vocabulary(spec).values()) + 1) // 64) * 64
    apply_parts(cfg, parts, {})
    if kind == "siglip" and cfg.width != cfg.vision.hidden_size:
        stop(f"width={cfg.width}, but in SigLIP it is that of the vision tower, {cfg.vision.hidden_size}")
    files = {"tokenizer.json": json.dumps(spec, ensure_ascii=False, indent=1).encode(),
             "tokenizer_config.json": json.dumps(names, indent=1).encode()}
    S = cfg.vision.image_size
    pre = pre or {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 3,
                  "do_convert_rgb": True, "image_mean": cfg.vision.image_mean, "image_std": cfg.vision.image_std,
                  **PROCESSORS["crop" if kind == "clip" else "squash"](S, S)}
    words = Words(spec, cfg.text.max_position_embeddings, pad_id(at, kind, spec, names))
    return cfg, PairFolder(words, {}, pre, files, notes=note), tensors


def with_ends(spec, names, kind):
    """A tokenizer without a post-processor -> one that writes BOS (not SigLIP), EOS; tokenizer_config.json; notes"""
    spec, notes = copy.deepcopy(spec), []
    ids = vocabulary(spec)
    bos, eos = (token_text(names.get(f"{role}_token")) for role in ("bos", "eos"))
    if eos not in ids:
        stop("a new text tower needs a tokenizer with an EOS token")
    if kind == "clip" and ids[eos] == 2:                   # see the top of this file
        eos = END
        spec["added_tokens"].append(added_token(max(ids.values()) + 1, END))
        ids = vocabulary(spec)
        notes = [f"the tokenizer of the text tower gets {END}, id {ids[END]}: transformers reads a CLIP whose EOS has "
                 "id 2 in another way"]
    ends = [t for t in (bos if kind != "siglip" and bos in ids else None, eos) if t]

    def tokens(kind_of):
        return [{"SpecialToken": {"id": t, "type_id": 0}} for t in ends if (t == eos) == kind_of]
    single = [*tokens(False), {"Sequence": {"id": "A", "type_id": 0}}, *tokens(True)]
    spec["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in ends}}
    pad = token_text(names.get("pad_token")) or eos
    return spec, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": pad,
                  "clean_up_tokenization_spaces": False}, notes


# ---- out ------------------------------------------------------------------------------------------------------------

def pairs_files(cfg, folder, dtype):
    """-> {file name: content} without weights, tokenizer and card"""
    v, t, kind, c = cfg.vision, cfg.text, cfg.kind, folder.config
    names = json.loads(folder.files.get("tokenizer_config.json", b"{}"))
    ids = vocabulary(json.loads(folder.files["tokenizer.json"])) if "tokenizer.json" in folder.files else {}
    ends = {f"{role}_token_id": ids.get(token_text(names.get(f"{role}_token"))) for role in ("bos", "eos", "pad")}
    keep = ("feature_layer", "feature_norm", "keep_class", "image_mean", "image_std", "num_register_tokens")
    vision = (c.get("vision_config") or {}) | {k: x for k, x in dataclasses.asdict(v).items() if k not in keep}
    text = (c.get("text_config") or {k: x for k, x in ends.items() if x is not None}) | dataclasses.asdict(t)
    if kind == "clip":
        vision["projection_dim"] = text["projection_dim"] = cfg.width
    else:
        text["projection_size"] = cfg.width
    name, processor = NAMES[kind]
    config = {k: x for k, x in c.items() if k not in ("vision_config_dict", "text_config_dict", "dtype")}
    config |= {"projection_dim": cfg.width} if kind == "clip" else {}
    config |= {"architectures": [name], "model_type": kind, "vision_config": vision, "text_config": text,
               "torch_dtype": str(dtype).removeprefix("torch.")}
    return {"config.json": config, "preprocessor_config.json": folder.pre | {"processor_class": processor}}


def save_pairs(out, state, cfg, folder, dtype=torch.float16, card=""):
    """Write a complete folder, or nothing after an error. state: {name: tensor}"""
    tensors = {k: x.view(()) if k == "logit_scale" and cfg.kind == "clip" else x for k, x in state.items()}
    if bad := next((k for k, x in tensors.items() if not x.to(dtype).isfinite().all()), None):
        stop(f"{out}: {bad} is not finite in {dtype} and is not published")

    def fill(tmp):
        write_shards(tmp, tensors, dtype)
        for name, content in (pairs_files(cfg, folder, dtype) | {"README.md": card}).items():
            write_file(tmp / name, content)
        for name, content in folder.files.items():
            (tmp / name).write_bytes(content)

    commit(Path(out), fill)

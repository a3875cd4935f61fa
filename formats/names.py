"""Names of a LLaVA's tensors. We use the names of llava-hf checkpoints; other names are changed when a file is read.
A missing tensor, an unexpected tensor or a wrong shape is an error that names the tensor."""

import dataclasses
import re

import torch

from config import stop
from model import VisionTower

# tensors that a LLaVA does not use: computed tables, CLIP's text encoder, SigLIP's pooling head, DINOv2's mask token
IGNORED = re.compile(r"vision_tower\.vision_model\.(embeddings\.(position_ids|mask_token)$|text_model\.|head\."
                     r"|(visual|text)_projection\.|logit_(scale|bias)$)|language_model\..*rotary_emb\.inv_freq$")
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64

# rename() applies these patterns in order, so that any known name of a tensor becomes our name
SPELLINGS = [(re.compile(theirs), ours) for theirs, ours in (
    (r"^base_model\.model\.", ""),                                                            # PEFT files
    (r"^(model\.)?mm_projector\.(0\.)?(?=weight|bias)", "multi_modal_projector.linear_1."),  # files of LLaVA's own code
    (r"^(model\.)?mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.(?=(embed_tokens|layers|norm)\.)", "language_model.model."),  # files of an LLM or of LLaVA's own code
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(?=(vision_tower|multi_modal_projector)\.|image_newline$)", ""),  # modules of transformers >= 4.52
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.vision_model\.", "vision_tower.vision_model."),                                # Idefics
    (r"^vision_tower\.(?!vision_model\.|second\.)", "vision_tower.vision_model."))]  # files of transformers >= 5
# (part of our name, what published DINOv2 files have in its place)
DINO_NAMES = (("class_embedding", "cls_token"), ("position_embedding.weight", "position_embeddings"),
              ("patch_embedding.", "patch_embeddings.projection."), ("encoder.layers.", "encoder.layer."),
              ("self_attn.q_proj", "attention.attention.query"), ("self_attn.k_proj", "attention.attention.key"),
              ("self_attn.v_proj", "attention.attention.value"), ("self_attn.out_proj", "attention.output.dense"),
              ("layer_scale1", "layer_scale1.lambda1"), ("layer_scale2", "layer_scale2.lambda1"),
              ("layer_norm", "norm"), ("post_layernorm", "layernorm"))


def rename(name):
    for theirs, ours in SPELLINGS:
        name = theirs.sub(ours, name)
    return name


def renamed(tensors, where, spell=rename):
    """{name: tensor} -> {our name: tensor}. Stops if two tensors get the same name. spell: name -> our name"""
    out = {}
    for k, x in tensors.items():
        if out.setdefault(spell(k), x) is not x:
            stop(f"{where} holds {spell(k)} under two names")
    return out


def dino_name(name, in_memory=False):
    """Our name of a DINOv2 tensor -> its name in published files; in_memory: its name in a model of transformers 5"""
    if in_memory:
        name = name.replace("self_attn.out_proj", "attention.o_proj").replace("self_attn.", "attention.")
    for ours, theirs in DINO_NAMES:
        name = name.replace(ours, theirs)
    return name


def spelling(model):
    """-> a function that turns any known name of a tensor, of the model or of an adapter, into our name"""
    ours = {}
    if model.cfg.vision.model_type.startswith("dinov2"):
        names = {**dict(model.named_modules()), **dict(model.named_parameters())}
        ours = {dino_name(n, in_memory): n for n in names for in_memory in (False, True)}

    def spell(name):
        layer, dot, rest = rename(name).partition(".lora_")
        return ours.get(layer, layer) + dot + rest
    return spell


def name_in_transformers(name, dino=False):
    """Our name -> the name in PEFT files, which is the name in a model of transformers 5. dino: is the ViT a DINOv2?"""
    name = dino_name(name, in_memory=True) if dino and name.startswith("vision_tower.") else name
    for ours, theirs in (("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),
                         ("vision_tower.vision_model.", "model.vision_tower."), ("multi_modal_", "model.multi_modal_")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def account(model, tensors, where, new=()):
    """{our name: tensor} of a folder -> (the model's parameters, unused tensors). Unused are the ViT's final norm and
    its blocks after the feature layer: all or none exist. new: parameters that the folder must not hold."""
    cfg = model.cfg
    want = {k: x.shape for k, x in model.state_dict().items() if k not in new}
    unused = {f"vision_tower.vision_model.post_layernorm.{k}": (cfg.vision.hidden_size,) for k in ("weight", "bias")}
    if isinstance(model.vision_tower, VisionTower):
        with torch.device("meta"):
            Tower = VisionTower if cfg.second else type(model.vision_tower)
            tower = Tower(dataclasses.replace(cfg.vision, feature_layer=-1))
        unused |= {f"vision_tower.{k}": p.shape for k, p in tower.named_parameters()}
    unused = {k: shape for k, shape in unused.items() if k not in want}
    if cfg.vision.model_type.startswith("dinov2"):
        ours = {dino_name(k): k for k in (*want, *unused)}
        tensors = renamed(tensors, where, lambda k: ours.get(k, k))
    tied = "language_model.lm_head.weight" if cfg.text.tie_word_embeddings else ""
    tensors = {k: x for k, x in tensors.items() if k != tied and not IGNORED.match(k)}
    known = want | (unused if tensors.keys() & unused.keys() else {})
    if missing := sorted(known.keys() - tensors.keys()):
        stop(f"{where}: {len(missing)} tensor(s) missing, the first is {missing[0]}")
    if extra := sorted(tensors.keys() - known.keys()):
        stop(f"{where}: {len(extra)} unexpected tensor(s), the first is {extra[0]}")
    for k, shape in known.items():
        while tensors[k].ndim > len(shape) and len(tensors[k]) == 1 and k.startswith("vision_tower."):
            tensors[k] = tensors[k][0]                                        # DINOv2 has a batch dimension of size 1
        if tensors[k].dtype not in FLOATS:                                    # for example a quantised tensor
            stop(f"{where}: {k} holds {tensors[k].dtype}, where one of {', '.join(map(str, FLOATS))} is supported")
        if tensors[k].shape != shape:
            stop(f"{where}: {k} has shape {tuple(tensors[k].shape)}, the config says {tuple(shape)}")
    return {k: tensors[k] for k in want}, {k: tensors[k] for k in known if k in unused}


def published_tensors(state, cfg):
    """-> {name: tensor} of a VLM, with the names and shapes of transformers' LLaVA. A connector of one matrix gets the
    identity as its second matrix, with no activation between them, so its output stays exactly the same."""
    D, norm = cfg.vision.hidden_size, "vision_tower.vision_model.post_layernorm."
    out = {f"{norm}weight": torch.ones(D), f"{norm}bias": torch.zeros(D)} | state  # required by transformers, not used
    if cfg.connector == "linear":
        C = cfg.text.hidden_size
        out["multi_modal_projector.linear_2.weight"] = torch.eye(C)
        out["multi_modal_projector.linear_2.bias"] = torch.zeros(C)
    if not cfg.vision.model_type.startswith("dinov2"):
        return out
    tower = {k: out.pop(k) for k in list(out) if k.startswith("vision_tower.")}
    for k, x in tower.items():
        k = dino_name(k.replace(".vision_model.", "."))
        tokens = re.search("cls_token|register_tokens|position_embeddings", k)
        out[k] = x.reshape(1, -1, x.shape[-1]) if tokens else x
    out.setdefault("vision_tower.embeddings.mask_token", torch.zeros(1, D))     # required by transformers, not used
    return out

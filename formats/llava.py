"""Published folders in and out. The state dict of model.VLM is the llava-hf layout already, so reading is one renaming
of other spellings, and writing is none. A missing, unexpected or misshapen tensor is an error that names it.

    folder        what is read from it; a name `org/name` is looked up in the hub's cache, then downloaded
    vision        config.json (CLIP or SigLIP, one half or both; DINOv2), preprocessor_config.json, weights
    llm           config.json (Llama, Mistral, Qwen2, Qwen3), tokenizer, weights
    init          all of that at once: a run; a llava-hf folder; one of the LLaVA repository, whole, or mm_projector.bin
                  alone, or a LoRA beside non_lora_trainables.bin
    weights       safetensors; else *.bin, opened by torch.load(weights_only=True), which runs no code; in shards or not
"""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import chat
from config import stop
from formats import jinja
from formats.configs import (LLAVA_EYES, PROCESSORS, TEXT, adapter_alpha, image_spec, positions, read_adapter_config,
                             read_config, read_pre, strategy, text_config, vision_config, vision_kind)
from formats.hub import find_folder, find_model, weights_file
from formats.strict_json import read_json
from formats.tensors import read_tensors, tensor_digest, write_json, write_shards
from formats.tokenizer import Tokenizer
from formats.whole import commit
from model import VLM, VisionTower, VLMConfig, init_weights

# what published files hold and nobody needs: tables that are made anew, the text half of a CLIP or SigLIP, the pooling
# head of a SigLIP, what DINOv2 puts in the place of a hidden patch
UNUSED = re.compile(r"vision_tower\.vision_model\.(embeddings\.(position_ids|mask_token)$|text_model\.|head\."
                    r"|(visual|text)_projection\.|logit_(scale|bias)$)|language_model\..*rotary_emb\.inv_freq$")
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64

# config.json of the LLaVA repository: the language models it knows, and what its other keys may say
LLAVA_TEXT = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
LLAVA_KEYS = {"mm_projector_type": ("linear", "mlp2x_gelu"), "mm_vision_select_feature": ("patch",),
              "mm_use_im_start_end": (False,), "mm_patch_merge_type": ("flat",),
              "image_aspect_ratio": ("square", "pad")}


# spellings of a LLaVA tensor, one after the other, until it is the llava-hf one, which is ours
SPELLINGS = [(re.compile(theirs), ours) for theirs, ours in (
    (r"^base_model\.model\.", ""),                                                    # PEFT
    (r"^(model\.)?mm_projector\.(0\.)?(?=weight|bias)", "multi_modal_projector.linear_1."),   # the LLaVA repository
    (r"^(model\.)?mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.(?=(embed_tokens|layers|norm)\.)", "language_model.model."),           # and a language model alone
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(?=(vision_tower|multi_modal_projector)\.)", ""),                      # transformers 4.52 on, in memory
    (r"^model\.language_model\.", "language_model.model."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."))]            # transformers 5, new ones
# ours -> DINOv2's
DINO_NAMES = (("class_embedding", "cls_token"), ("position_embedding.weight", "position_embeddings"),
              ("patch_embedding.", "patch_embeddings.projection."), ("encoder.layers.", "encoder.layer."),
              ("self_attn.q_proj", "attention.attention.query"), ("self_attn.k_proj", "attention.attention.key"),
              ("self_attn.v_proj", "attention.attention.value"), ("self_attn.out_proj", "attention.output.dense"),
              ("layer_scale1", "layer_scale1.lambda1"), ("layer_scale2", "layer_scale2.lambda1"),
              ("layer_norm", "norm"), ("post_layernorm", "layernorm"))


# ---- finding --------------------------------------------------------------------------------------------------------


# ---- reading --------------------------------------------------------------------------------------------------------


def rename(name):
    """Any known spelling of a LLaVA tensor -> the llava-hf one, which is ours."""
    for theirs, ours in SPELLINGS:
        name = theirs.sub(ours, name)
    return name


def renamed(tensors, where, spell=rename):
    """{name: tensor} under our names; two names for one thing are an error."""
    out = {}
    for k, x in tensors.items():
        if out.setdefault(spell(k), x) is not x:
            stop(f"{where} holds {spell(k)} under two names")
    return out


def dino_name(name):
    """Our name of a tensor of a DINOv2 -> the published one"""
    for ours, theirs in DINO_NAMES:
        name = name.replace(ours, theirs)
    return name


# ---- folders --------------------------------------------------------------------------------------------------------

class Folder(NamedTuple):
    """What a model came with beside its weights, for writing it out again."""
    tok: Tokenizer
    vision: dict                # config of the tower, as published
    text: dict                  # config of the language model, as published
    pre: dict                   # preprocessor_config.json
    spare: dict                 # tensors that are not built: blocks behind the feature layer, the last norm
    meta: dict                  # template, system text and image_aspect of a model that was trained here
    marks: dict = {}            # {name: tensor_digest(tensor)} of what was read
    notes: list = []            # what tokenizer and tower were lacking and got


def tower(folder):
    """-> config, preprocessor_config, {our name: tensor} of a vision tower"""
    v = read_config(folder)
    if nested := v.get("vision_config_dict") or v.get("vision_config"):       # a CLIP or SigLIP with both its halves
        v = {"model_type": f"{v.get('model_type')}_vision_model", **nested}
    pre = read_pre(folder, vision_kind(v))                                    # first of all: is it one?
    return v, pre, renamed({f"vision_tower.{k}": x for k, x in read_tensors(folder).items()}, folder)


def llava(folder, c):
    """A llava-hf folder -> Folder, tensors, feature layer"""
    if c.get("model_type") != "llava":
        stop(f"{folder} holds a {c.get('model_type')!r}, not a llava model")
    v, t, layer = c.get("vision_config") or LLAVA_EYES, c.get("text_config") or {}, c.get("vision_feature_layer", -2)
    t = t | {"tie_word_embeddings": bool(c.get("tie_word_embeddings") or t.get("tie_word_embeddings"))}
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int):
        stop(f"{folder}: several feature layers {layer}; one is known here")
    how, usual = c.get("vision_feature_select_strategy", "default"), strategy(vision_config(v, layer))
    if how != usual:
        stop(f"{folder}: vision_feature_select_strategy {how!r} with {v.get('model_type')} is not known here")
    meta = read_json(folder / "pumice.json") if (folder / "pumice.json").is_file() else {}
    tensors = renamed(read_tensors(folder), folder)
    if (act := c.get("projector_hidden_act", "gelu")) == "linear":            # as published_tensors writes one matrix
        unit, bias = (tensors.pop(f"multi_modal_projector.linear_2.{k}", None) for k in ("weight", "bias"))
        if unit is None or bias is None or bias.any() or not unit.equal(torch.eye(*unit.shape, dtype=unit.dtype)):
            stop(f"{folder}: a linear connector of two matrices is not known here")
    elif act != "gelu":
        stop(f"{folder}: projector_hidden_act {act!r} is not known here")
    if v.get("model_type") == "dinov2_with_registers" and not meta:
        stop(f"{folder}: a tower whose register tokens are read along with the patches is not known here")
    tok = Tokenizer(folder, c.get("image_token_index", c.get("image_token_id", 32000)))
    return Folder(tok, v, t, read_pre(folder, vision_kind(v)), {}, meta), tensors, layer


def original(folder, c):
    """A folder of the LLaVA repository -> Folder, tensors, feature layer. Its config.json names the tower, and where
    only a connector or a LoRA was trained, the language model below it."""
    for key, known in LLAVA_KEYS.items():
        if (value := c.get(key)) not in (None, *known):
            stop(f"{folder}: {key}={value!r}, where {' or '.join(map(repr, known))} is known here")
    base, extra, scale = folder, {}, 0
    if weights_file(folder, "adapter_model"):
        a = read_adapter_config(folder)
        for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
            if a.get(key):
                stop(f"{folder}: {key}={a[key]} is not known here")
        r, base = a.get("r"), a.get("base_model_name_or_path")
        scale = adapter_alpha(folder, a, r, a.get("lora_alpha")) / r
        extra = read_tensors(folder, "adapter_model") | read_tensors(folder, "non_lora_trainables")
    elif not weights_file(folder):
        base, extra = c.get("_name_or_path"), read_tensors(folder, "mm_projector")
    if not all(name and isinstance(name, str | Path) for name in (base, c["mm_vision_tower"])):
        stop(f"{folder} does not say in its configs which models it was trained on")
    base = find_folder(base)
    v, pre, tensors = tower(find_folder(c["mm_vision_tower"]))
    tensors |= renamed(read_tensors(base), base) | renamed(extra, folder)     # what was trained last counts
    for k in [k for k in tensors if k.endswith(".lora_A.weight")]:
        name = k.removesuffix(".lora_A.weight")
        A, B, W = (tensors.pop(k, None) for k in (k, f"{name}.lora_B.weight", f"{name}.weight"))
        if B is None or W is None or W.shape != (len(B), A.shape[1]):
            stop(f"{folder}: the adapter of {name} has no matrix that it fits")
        tensors[f"{name}.weight"] = W.float() + scale * (B.float() @ A.float())
    t = {k: x for k, x in c.items() if not re.match("mm_|tune_mm_|freeze_mm_|use_mm_|image_", k)}
    t["model_type"] = LLAVA_TEXT.get(c.get("model_type"), c.get("model_type"))
    tok = Tokenizer(folder if any(folder.glob("tokenizer*")) else base)
    pads = c.get("image_aspect_ratio") == "pad"
    return Folder(tok, v, t, pre | {"do_pad": pads}, {}, {}), tensors, c.get("mm_vision_select_layer", -2)


def load_model(vision="", llm="", init="", connector="mlp", seed=0, dtype=torch.float32):
    """-> VLM, Folder. From two towers with a new connector, or from `init`; every tensor accounted for. With dtype=None
    each tensor stays as it is in its file, in the memory of nobody, until engine.choose takes what it needs of it."""
    where, layer = init or f"{vision} + {llm}", -2
    if init:
        at = find_model(init)
        c = read_config(at)
        folder, tensors, layer = (original if "mm_vision_tower" in c else llava)(at, c)
        connector = "mlp" if any("linear_2" in k for k in tensors) else "linear"
    else:
        eyes, tongue = find_folder(vision), find_folder(llm)
        t, (v, pre, tensors) = read_config(tongue), tower(eyes)
        folder = Folder(Tokenizer(tongue), v, t, pre, {}, {})
        tensors |= renamed(read_tensors(tongue), tongue)
    cfg = VLMConfig(vision_config(folder.vision, layer, folder.pre), text_config(folder.text), connector,
                    folder.tok.image)
    if (side := image_spec(folder.pre, "pad").side) != cfg.vision.image_size and init:
        stop(f"{where}: preprocessor_config.json makes pictures of side {side}, the tower reads "
             f"{cfg.vision.image_size}")
    head, words = (tensors.get(f"language_model.{k}.weight") for k in ("lm_head", "model.embed_tokens"))
    if cfg.text.tie_word_embeddings and head is not None:                     # as transformers 5 has it
        cfg.text.tie_word_embeddings = words is not None and torch.equal(head, words)
    notes = folder.tok.notes + grow(tensors, cfg.text, folder.tok, where)
    with torch.device("meta"):
        model = VLM(cfg)
    tensors, spare = account(model, tensors, where, () if init else "multi_modal_projector.")
    for k, x in (tensors | spare).items():
        if not all(v.isfinite() for v in x.aminmax()):                        # 20 x as fast as x.isfinite().all()
            stop(f"{where}: {k} holds numbers that are not finite")
    if side != cfg.vision.image_size:                                         # pictures of another size than published
        table = "vision_tower.vision_model.embeddings.position_embedding.weight"
        tensors[table] = resampled(tensors[table], cfg.vision, side)
        notes.append(f"pictures of side {side}, the tower was trained on {cfg.vision.image_size}: its positions are "
                     "resampled")
        cfg.vision.image_size = side
        with torch.device("meta"):
            model = VLM(cfg)
    marks = {k: tensor_digest(x) for k, x in tensors.items()}
    for k in tensors if dtype else ():                                        # one at a time: never all of them twice
        tensors[k] = tensors[k].to(dtype, copy=True)                          # its own, whatever becomes of the file
    model.load_state_dict(tensors, strict=False, assign=True)
    if not init:
        init_weights(model.multi_modal_projector.to_empty(device="cpu"), seed)
    return model, folder._replace(spare=spare, marks=marks, notes=notes)


def grow(tensors, cfg, tok, where):
    """Give the tokens that the tokenizer was lacking their rows in the embedding and in the head, up to a multiple of
    64 as in LLaVA-HF -> lines that say so; `tensors` and cfg.vocab_size change.

    A new row is the mean of the old ones, as in LLaVA. For the embedding it hardly matters: a picture's features
    replace it, and padding is not read. In the head it makes a new logit the mean of the old ones, which (Jensen) is
    never above their log-sum-exp - log V: n new rows raise no loss by more than log(1 + n/V), where a row drawn at
    random could be any prompt's best guess.
    """
    V = cfg.vocab_size
    if tok.published > V:
        stop(f"{where}: the tokenizer knows {tok.published} ids, the embedding {V}")
    if len(tok) <= V:
        return []
    cfg.vocab_size = -(-len(tok) // 64) * 64
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        x = tensors.get(name)
        if x is not None and x.shape[:1] == (V,):                             # else `account` says what is wrong
            mean = sum(part.sum(0, dtype=torch.float64) for part in x.split(4096)) / V     # the same on any machine
            tensors[name] = torch.cat([x, mean.to(x.dtype).expand(cfg.vocab_size - V, -1)])
    return [f"embedding and head get {cfg.vocab_size - V} rows for it, each the mean of the old ones: {V:,} -> "
            f"{cfg.vocab_size:,}"]


def resampled(table, v, side):
    """Positions (first + n n, D) -> (first + m m, D) for pictures of another side: bicubic over the grid of patches, as
    interpolate_pos_encoding of transformers, where DINOv2 with registers alone smooths what it shrinks."""
    n, m, first = v.image_size // v.patch_size, side // v.patch_size, int(v.class_token)
    if m == 0:
        stop(f"preprocessor_config.json: pictures of side {side} hold no patch of {v.patch_size}")
    if m == n:
        return table
    grid = table[first:].float().view(1, n, n, -1).permute(0, 3, 1, 2)                             # (1, D, n, n)
    grid = F.interpolate(grid, size=(m, m), mode="bicubic", antialias=v.model_type == "dinov2_with_registers")
    return torch.cat([table[:first], grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)])


def account(model, tensors, where, new=()):
    """{our name: tensor} of a folder -> what the model holds of it, and what it need not: the blocks behind the feature
    layer and the norm behind them, of which there are all or none. Names that begin with `new` are not expected.
    Whatever is missing, unexpected or misshapen ends here, by its name."""
    cfg = model.cfg
    with torch.device("meta"):
        whole = VisionTower(dataclasses.replace(cfg.vision, feature_layer=-1))
    want = {k: p.shape for k, p in model.named_parameters() if not k.startswith(new)}
    spare = {f"vision_tower.{k}": p.shape for k, p in whole.named_parameters()}
    spare |= {f"vision_tower.vision_model.post_layernorm.{k}": (cfg.vision.hidden_size,) for k in ("weight", "bias")}
    spare = {k: s for k, s in spare.items() if k not in want}
    if cfg.vision.model_type.startswith("dinov2"):
        ours = {dino_name(k): k for k in (*want, *spare)}
        tensors = renamed(tensors, where, lambda k: ours.get(k, k))
    if cfg.text.tie_word_embeddings:
        tensors = {k: x for k, x in tensors.items() if k != "language_model.lm_head.weight"}
    tensors = {k: x for k, x in tensors.items() if not UNUSED.match(k)}
    known = want | (spare if tensors.keys() & spare.keys() else {})
    if missing := sorted(known.keys() - tensors.keys()):
        stop(f"{where}: {len(missing)} tensor(s) missing, the first is {missing[0]}")
    if extra := sorted(tensors.keys() - known.keys()):
        stop(f"{where}: {len(extra)} unexpected tensor(s), the first is {extra[0]}")
    for k, shape in known.items():
        while tensors[k].ndim > len(shape) and len(tensors[k]) == 1 and k.startswith("vision_tower."):
            tensors[k] = tensors[k][0]                                        # DINOv2's tokens are batches of one
        if tensors[k].dtype not in FLOATS:                                    # codes, whose scales are elsewhere
            stop(f"{where}: {k} holds {str(tensors[k].dtype).removeprefix('torch.')}, no weights in "
                 "float16, bfloat16, float32 or float64")
        if tensors[k].shape != shape:
            stop(f"{where}: {k} has shape {tuple(tensors[k].shape)}, the config says {tuple(shape)}")
    return {k: tensors[k] for k in want}, {k: tensors[k] for k in known if k in spare}


def aspect(folder, cfg):
    """How the pictures of a LLaVA folder became squares: ours says so, of others the image processor does."""
    crops = folder.pre.get("do_center_crop", cfg.vision.class_token)
    does = "pad" if folder.pre.get("do_pad") else "crop" if crops else "squash"
    says = folder.meta.get("image_aspect") or does
    if (says == "pad") != (does == "pad"):
        stop(f"{folder.tok.folder}: pumice.json says image_aspect={says}, preprocessor_config.json "
             f"{'pads' if does == 'pad' else 'does not pad'}")
    return says


# ---- writing --------------------------------------------------------------------------------------------------------

def save_model(out, state, cfg, folder, template, system, aspect, dtype=torch.float16, card=""):
    """A complete llava-hf folder, whole or absent, that transformers since 4.46 reads alike. state: the tensors of a
    VLM by name; each is rounded to dtype when its shard is written, so there is no second copy of all of them."""
    v, t, tok = cfg.vision, cfg.text, folder.tok
    names = {i: name for name, i in tok.specials.items()}
    layer, pad, image, talk = v.feature_layer, tok.pad, names[cfg.image_token_index], jinja.jinja(template, system)
    end, = [tok.eos] if chat.template(template).stop == "\n" else chat.stop_ids(tok, template)

    def published(old, new, keys):
        """The config a part came with, and over it what was built."""
        old = {k: x for k, x in old.items() if k not in ("rope_parameters", "dtype", "torch_dtype")}
        return old | {k: getattr(new, k) for k in keys.split()}

    sizes = "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads "
    text = published(folder.text, t, sizes + "num_key_value_heads head_dim vocab_size rms_norm_eps rope_theta "
                     "rope_scaling max_position_embeddings tie_word_embeddings")
    text["architectures"] = [TEXT[t.model_type]["architecture"]]
    vision = published(folder.vision, v, sizes + "image_size patch_size hidden_act layer_norm_eps")
    vision["num_channels"] = 3
    if v.depth < v.num_hidden_layers and not any(".encoder." in k for k in folder.spare):     # it came without the rest
        vision["num_hidden_layers"], layer = v.depth, -1
    if v.model_type.startswith("dinov2"):
        vision["mlp_ratio"] = vision.pop("intermediate_size") // v.hidden_size
    if v.model_type == "siglip_vision_model":
        vision["vision_use_head"] = False                                     # the pooling head is not kept
    pre = {k: x for k, x in folder.pre.items() if k != "do_pad"}
    short = image_spec(folder.pre, aspect).short or v.image_size
    pre |= {"processor_class": "LlavaProcessor"} | PROCESSORS[aspect](v.image_size, short)
    tokenizer = tok.spec | {"post_processor": None}                           # the template writes BOS
    files = {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "ignore_index": -100,
            "image_token_index": cfg.image_token_index, "image_seq_length": v.patches,
            "projector_hidden_act": "gelu" if cfg.connector == "mlp" else "linear",
            "multimodal_projector_bias": True, "vision_feature_layer": layer,
            "vision_feature_select_strategy": strategy(v), "pad_token_id": pad,
            "tie_word_embeddings": t.tie_word_embeddings, "torch_dtype": str(dtype).removeprefix("torch."),
            "text_config": text, "vision_config": vision},
        "generation_config.json": {
            "bos_token_id": tok.bos, "eos_token_id": end, "pad_token_id": pad,
            "do_sample": False,                                        # no words: the image, and what pads the rows
            "suppress_tokens": sorted({cfg.image_token_index, *range(len(tok), t.vocab_size)})},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names.get(tok.bos),
            "eos_token": names.get(tok.eos), "pad_token": names.get(pad),
            "unk_token": "<unk>" if "<unk>" in tok.specials else None, "model_max_length": positions(t),
            "padding_side": "left", "clean_up_tokenization_spaces": False, "image_token": image,
            "model_input_names": ["input_ids", "attention_mask"], "processor_class": "LlavaProcessor",
            "chat_template": talk},                                           # where transformers before 4.50 look,
        "chat_template.json": {"chat_template": talk},                        # and their processors
        "preprocessor_config.json": pre,
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "patch_size": v.patch_size, "image_token": image,
            # a processor does nothing but count with these: P + 1 - 1 whichever the tower, for 4.46 always adds the 1
            "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        "pumice.json": {"template": template, "system": system, "image_aspect": aspect}}

    tensors = published_tensors({**state, **folder.spare}, cfg)
    if bad := next((k for k, x in tensors.items() if not x.to(dtype).isfinite().all()), None):
        stop(f"{out}: {bad} is not finite in {dtype} and is not published")

    def fill(tmp):
        write_shards(tmp, tensors, dtype)
        for name, obj in files.items():
            write_json(tmp / name, obj)
        (tmp / "README.md").write_text(card, "utf-8")
        (tmp / "chat_template.jinja").write_text(talk, "utf-8")

    commit(out, fill)


def published_tensors(state, cfg):
    """The tensors of a VLM as transformers' Llava names and shapes them. A connector of one matrix is written as two,
    the second one the unit matrix and nothing between them: the same numbers, exactly."""
    D, norm = cfg.vision.hidden_size, "vision_tower.vision_model.post_layernorm."
    out = {f"{norm}weight": torch.ones(D), f"{norm}bias": torch.zeros(D)} | state    # LLaVA has it and never reads it
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
    out.setdefault("vision_tower.embeddings.mask_token", torch.zeros(1, D))   # nor this
    return out


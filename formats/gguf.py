"""Write a LLaVA folder as two GGUF files for llama.cpp: the LLM, and the vision tower with the connector (mmproj).

Keys and tensor names are those that llama.cpp's converter writes (conversion/llama.py, qwen.py) and its loaders read
(src/llama-vocab.cpp, tools/mtmd/clip.cpp; at commit 0c1e570, October 2026). We do not use the converter: it does not
read the vision tower of our folders, and it knows a tokenizer only if the hash of its ids for a test string is listed.
This file compares a tokenizer's rules with llama.cpp's and refuses a tokenizer that llama.cpp would run differently.

    V vocabulary size   K width of an attention head
"""

import os
import re
import struct
from functools import partial
from pathlib import Path

import torch

import chat
from config import stop
from formats import configs, jinja, llava
from formats.families import family_of, is_llava
from formats.strict_json import read_json
from model import rope_frequencies

ALIGN = 32
# name -> torch dtype, the type's number in ggml, the number for the key general.file_type
DTYPES = {"f32": (torch.float32, 0, 0), "f16": (torch.float16, 1, 1), "bf16": (torch.bfloat16, 30, 32)}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types, numbered as in llama.cpp

# our parameter name -> its name in llama.cpp
TEXT = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
         "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
VISION = {"embeddings.class_embedding": "v.class_embd", "embeddings.patch_embedding": "v.patch_embd",
          "embeddings.position_embedding": "v.position_embd", "pre_layrnorm": "v.pre_ln"}
BLOCK = {"layer_norm1": "ln1", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.out_proj": "attn_out", "layer_norm2": "ln2", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}
CONNECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}

# regular expression of a pre-tokenizer's Split step; %s: how it splits digits
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# steps of a byte-level pre-tokenizer, each with its options -> name of this pre-tokenizer in llama.cpp
BYTE_LEVEL = {
    (("Split", _SPLIT % r"\p{N}{1,3}", "Isolated", False), ("ByteLevel", False, False)): "llama-bpe",
    (("Split", _SPLIT % r"\p{N}", "Isolated", False), ("ByteLevel", False, False)): "qwen2",
    (("Digits", True), ("ByteLevel", False, True)): "smollm",
    (("ByteLevel", False, True),): "gpt-2"}
# (normalizers, pre-tokenizers) of a converted SentencePiece tokenizer -> does it add a space before the text?
SENTENCEPIECE = {
    (("Prepend", "Replace"), ()): True, (("Replace",), ()): False, ((), (("Metaspace", "always", False),)): True,
    ((), (("Metaspace", "first", False),)): True, ((), (("Metaspace", "never", False),)): False}


# ---- the file format ------------------------------------------------------------------------------------------------

def packed(value):
    """Encode a value -> number of its type in GGUF, bytes. An int becomes a uint32, a float becomes a float32. A list
    becomes an array of int32, float32 or strings."""
    if isinstance(value, str):
        raw = value.encode("utf-8")
        return 8, struct.pack("<Q", len(raw)) + raw
    if not isinstance(value, list):
        kind, code = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}[type(value)]
        return kind, struct.pack(code, value)
    if isinstance(value[0], str):
        kind, items = 8, b"".join(packed(s)[1] for s in value)
    else:
        kind, code = {int: (5, "i"), float: (6, "f")}[type(value[0])]
        items = struct.pack(f"<{len(value)}{code}", *value)
    return 9, struct.pack("<IQ", kind, len(value)) + items


def write_gguf(path, keys, tensors):
    """Write a GGUF file, version 3. keys: {name: value}. tensors: a function that yields (name, tensor, key of DTYPES).
    It is called twice: first for the shapes, then for the values. So only one tensor at a time must be in memory."""
    table, at = [(name, x.shape, dtype) for name, x, dtype in tensors()], 0
    head = [b"GGUF", struct.pack("<IQQ", 3, len(table), len(keys))]
    for name, value in keys.items():
        kind, raw = packed(value)
        head += [packed(name)[1], struct.pack("<I", kind), raw]
    for name, shape, dtype in table:
        head += [packed(name)[1], struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)),  # last axis first
                 struct.pack("<IQ", DTYPES[dtype][1], at)]
        at += padded(shape.numel() * DTYPES[dtype][0].itemsize)
    tmp = path.with_name(f".tmp-{path.name}")
    try:
        with open(tmp, "wb") as f:
            f.write(b"".join(head))
            f.write(bytes(padded(f.tell()) - f.tell()))
            for name, x, dtype in tensors():
                x = x.detach().cpu().to(DTYPES[dtype][0]).contiguous()
                if not x.isfinite().all():
                    stop(f"{path}: {name} is not finite in {dtype}")
                f.write(memoryview(x.flatten().view(torch.uint8).numpy()))
                f.write(bytes(padded(x.nbytes) - x.nbytes))
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)                                                 # `path` never holds an incomplete file
    finally:
        tmp.unlink(missing_ok=True)


def padded(n):
    return -(-n // ALIGN) * ALIGN


# ---- the language model ---------------------------------------------------------------------------------------------

def interleaved(x, heads):
    """Reorder the K rows of each head of q_proj or k_proj. RoPE rotates pairs of rows. Our pairs are (i, i + K / 2),
    those of llama.cpp are (2 * i, 2 * i + 1)."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def gguf_name(name, table, block={}, prefix=""):
    """Translate our name of a parameter to its name in llama.cpp.

    table     {our name: name in llama.cpp} for parameters outside the blocks
    block     a dict like `table`, for parameters inside a block
    prefix    how the names inside a block begin in llama.cpp, such as blk"""
    stem, _, last = name.rpartition(".")
    if layer := re.match(r"(?:model|encoder)\.layers\.(\d+)\.(.*)", stem):
        return f"{prefix}.{layer[1]}.{block[layer[2]]}.{last}"
    return f"{table[stem]}.{last}" if stem in table else table[name]


def text_tensors(language_model, cfg, dtype):
    heads = {"q_proj": cfg.num_attention_heads, "k_proj": cfg.num_key_value_heads}
    for k, x in language_model.state_dict().items():
        layer = k.split(".")[-2]
        if layer in heads and cfg.model_type in ("llama", "mistral"):         # for Qwen, llama.cpp uses our row order
            x = interleaved(x, heads[layer])
        yield gguf_name(k, TEXT, LAYER, "blk"), x, dtype if x.ndim > 1 else "f32"
    if (cfg.rope_scaling or {}).get("rope_type") == "llama3":
        plain = type(cfg)(head_dim=cfg.head_dim, rope_theta=cfg.rope_theta)
        yield "rope_freqs.weight", rope_frequencies(plain) / rope_frequencies(cfg), "f32"


def text_keys(cfg, dtype, name):
    arch = "llama" if cfg.model_type == "mistral" else cfg.model_type
    if arch not in ("llama", "qwen2", "qwen3"):
        stop(f"{name}: a language model of type {cfg.model_type!r} is not exported: llama, mistral, qwen2, qwen3")
    if arch == "qwen3" and cfg.qkv_bias:
        stop(f"{name}: llama.cpp has no qwen3 with attention_bias")
    keys = {"general.architecture": arch, "general.type": "model", "general.name": name,
            "general.file_type": DTYPES[dtype][2]}
    keys |= {f"{arch}.{k}": v for k, v in {
        "vocab_size": cfg.vocab_size, "block_count": cfg.num_hidden_layers, "embedding_length": cfg.hidden_size,
        # llama.cpp has no sliding window for these models, so the context must not be longer than the window
        "context_length": min(cfg.max_position_embeddings, cfg.sliding_window or cfg.max_position_embeddings),
        "feed_forward_length": cfg.intermediate_size, "attention.head_count": cfg.num_attention_heads,
        "attention.head_count_kv": cfg.num_key_value_heads, "attention.key_length": cfg.head_dim,
        "attention.value_length": cfg.head_dim, "attention.layer_norm_rms_epsilon": float(cfg.rms_norm_eps),
        "rope.dimension_count": cfg.head_dim, "rope.freq_base": float(cfg.rope_theta)}.items()}
    scaling = cfg.rope_scaling or {}
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        keys |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": float(scaling["factor"])}
    return keys


# ---- the tokenizer --------------------------------------------------------------------------------------------------

def steps_of(part, key):
    """List the steps of a normalizer or pre-tokenizer in tokenizer.json. key: name of the field that holds the steps"""
    return [] if part is None else part[key] if part["type"] == "Sequence" else [part]


def pre_tokenizer(spec, where):
    """Find the pre-tokenizer of llama.cpp that fits a tokenizer. Stop if none fits. Return two values:

        its name in llama.cpp, or None for a SentencePiece tokenizer
        is a space added before the text? True or False

    spec: content of tokenizer.json. where: how messages call the tokenizer"""
    options = {"Split": lambda s: (s["pattern"].get("Regex"), s["behavior"], s["invert"]),
               "ByteLevel": lambda s: (s["add_prefix_space"], s.get("use_regex", True)),
               "Digits": lambda s: (s["individual_digits"],),
               "Metaspace": lambda s: (s.get("prepend_scheme", "always"), s.get("split", True))}
    norms = tuple(n["type"] for n in steps_of(spec.get("normalizer"), "normalizers"))
    steps = tuple((s["type"], *options.get(s["type"], lambda s: ())(s))
                  for s in steps_of(spec.get("pre_tokenizer"), "pretokenizers"))
    ignore_merges = bool(spec["model"].get("ignore_merges"))            # true: a word of the vocabulary is not split
    if steps in BYTE_LEVEL and norms in ((), ("NFC",)) and ignore_merges == (BYTE_LEVEL[steps] == "llama-bpe"):
        # llama.cpp does not convert text to NFC (a normal form of Unicode), so other forms get other ids there
        return BYTE_LEVEL[steps], False
    if (norms, steps) not in SENTENCEPIECE or ignore_merges or not spec["model"].get("byte_fallback"):
        stop(f"{where}: llama.cpp has no such pre-tokenizer: {[*norms, *(s[0] for s in steps)]}")
    return None, SENTENCEPIECE[norms, steps]


def scores(vocab, merges, where):
    """Turn a list of merges into the scores that SentencePiece uses -> {piece: score}. SentencePiece has no list of
    merges. It always merges the two neighbours that together form the piece with the highest score.

    vocab     {piece: id}
    merges    [(left piece, right piece)], the best merge first"""
    out, last = {}, None
    for rank, (a, b) in enumerate(merges):
        if a + b != last and a + b in out:
            break
        last = a + b
        out.setdefault(last, -float(rank))
    splits = sum(p[:i] in vocab and p[i:] in vocab for p in out for i in range(1, len(p)))
    orphans = {p for p in vocab.keys() - out.keys() if any(p[:i] in vocab and p[i:] in vocab for i in range(1, len(p)))}
    if splits != len(merges) or orphans:
        stop(f"{where}: these merges are not those of a SentencePiece model; llama.cpp would tokenise differently")
    return out


def tokenizer_keys(tok, V, template, system=None):
    """Return the GGUF keys of a tokenizer. V: vocabulary size. template: a name in chat.py, or None: then the file gets
    the template in the tokenizer's folder."""
    where, spec = f"the tokenizer in {tok.folder}", tok.spec
    if (kind := spec["model"].get("type")) != "BPE":
        stop(f"{where}: a tokenizer of type {kind!r} is not exported: BPE")
    vocab = spec["model"]["vocab"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in spec["model"]["merges"]]
    added = {t["content"]: t for t in spec["added_tokens"]}
    pre, space = pre_tokenizer(spec, where)
    names, types = [f"[PAD{i}]" for i in range(V)], [UNUSED] * V              # default, for ids without a token
    for piece, i in {**vocab, **{c: t["id"] for c, t in added.items()}}.items():
        names[i], types[i] = piece, NORMAL
        if piece in added:
            types[i] = CONTROL if added[piece]["special"] else USER_DEFINED
    if pre:
        keys = {"model": "gpt2", "pre": pre, "merges": [" ".join(m) for m in merges]}
    else:
        for byte in range(256):
            types[vocab[f"<0x{byte:02X}>"]] = BYTE
        score = scores({p: i for p, i in vocab.items() if types[i] == NORMAL}, merges, where)
        keys = {"model": "llama", "pre": "default", "add_space_prefix": space,
                "scores": [score.get(n, -float(len(merges))) for n in names]}
        if (unknown := vocab.get(spec["model"].get("unk_token"))) is not None:
            types[unknown] = UNKNOWN
            keys["unknown_token_id"] = unknown
    end = chat.template(template).stop if template else ""
    ids = {"bos": tok.bos, "eos": tok.eos, "padding": tok.pad, "eot": tok.specials.get(end)}
    keys |= {f"{k}_token_id": i for k, i in ids.items() if i is not None}
    keys |= {"tokens": names, "token_type": types, "add_bos_token": tok.full.encode("a").ids[:1] == [tok.bos],
             "add_eos_token": False}
    text = with_media_marker(jinja.jinja(template, system)) if template else own_template(tok.folder)
    return {f"tokenizer.ggml.{k}": v for k, v in keys.items()} | ({"tokenizer.chat_template": text} if text else {})


def own_template(folder):
    """Read the chat template in a folder -> text, or None. transformers has used several files for it: the first one
    that exists counts."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text("utf-8")
    found = [read_json(folder / f, {}).get("chat_template") for f in ("chat_template.json", "tokenizer_config.json")]
    return next((text for text in found if isinstance(text, str)), None)


def with_media_marker(text):
    """Adapt our jinja template to llama.cpp, which marks an image in the text with <__media…__>. A single marker
    moves to the beginning of its message and gets a newline, as a single <image> does in training."""
    text = text.replace(jinja.BEGIN, "").replace(jinja.END, "")               # some programs do not know these tags
    marker = ("{% set mark = '<__media' + said.split('<__media')[1].split('__>')[0] + '__>' if '<__media' in said "
              "else '<image>' %}")
    head, turns = text.split(jinja.CONTENT)
    return head + jinja.CONTENT + marker + turns.replace("'<image>\\n'", "mark + '\\n'").replace("'<image>'", "mark")


# ---- vision tower and connector -------------------------------------------------------------------------------------

def mmproj_tensors(model, dtype):
    for k, x in model.vision_tower.vision_model.state_dict().items():
        # in fp32: vectors and position embeddings. A convolution (4-D) must be in f32 or f16, so it is never in bf16
        fp32 = x.ndim == 1 or "position" in k or x.ndim == 4 and dtype == "bf16"
        yield gguf_name(k, VISION, BLOCK, "v.blk"), x, "f32" if fp32 else dtype
    for k, x in model.multi_modal_projector.state_dict().items():
        yield gguf_name(k, CONNECTOR), x, "f32" if x.ndim == 1 else dtype


def mmproj_keys(cfg, dtype, name):
    v = cfg.vision
    if v.model_type not in ("clip_vision_model", "siglip_vision_model"):
        stop(f"{name}: llama.cpp has no {v.model_type} with a LLaVA connector: CLIP and SigLIP")
    if cfg.connector != "mlp":
        stop(f"{name}: llama.cpp has no {cfg.connector} connector: mlp")
    keys = {"general.architecture": "clip", "general.type": "mmproj", "general.name": name,
            "general.file_type": DTYPES[dtype][2]}
    return keys | {f"clip.{k}": x for k, x in {
        "has_text_encoder": False, "has_vision_encoder": True, "has_llava_projector": True, "projector_type": "mlp",
        "use_gelu": v.hidden_act != "quick_gelu", "vision.image_size": v.image_size, "vision.patch_size": v.patch_size,
        "vision.embedding_length": v.hidden_size, "vision.feed_forward_length": v.intermediate_size,
        "vision.projection_dim": cfg.text.hidden_size, "vision.attention.head_count": v.num_attention_heads,
        "vision.attention.layer_norm_epsilon": float(v.layer_norm_eps), "vision.block_count": v.depth,
        "vision.feature_layer": [v.depth],                                    # else llama.cpp skips the last block
        "vision.image_mean": [float(m) for m in v.image_mean],
        "vision.image_std": [float(s) for s in v.image_std]}.items()}


def differences(cfg, folder):
    """-> lines for the user; each names one way in which llama.cpp treats images or text differently from training."""
    aspect, spec = llava.aspect(folder, cfg), configs.image_spec(folder.pre, "pad")
    if aspect != "pad":
        yield f"this model was trained with image_aspect={aspect}; llama.cpp pads images that are not square"
    elif (colour := tuple(int(255 * m) for m in spec.mean)) != (122, 116, 104):
        yield f"this model was trained with borders of the colour {colour}; llama.cpp paints (122, 116, 104)"
    if spec.resample != 3:
        yield f"this model was trained with resample={spec.resample}; llama.cpp uses 3, bicubic"
    if cfg.vision.class_token:
        yield ("llama.cpp since May 2025 (issue 25814, open in October 2026) puts CLIP's class token behind the "
               "patches and shifts their positions by one: answers about images get worse; SigLIP is not affected")
    if folder.tok.inside is not folder.tok.start:
        yield "this tokenizer adds a space at the start of the text; llama.cpp adds one after each control token, too"


def export(folder, out, dtype):
    """Write the two GGUF files of a LLaVA folder or a run. Only one tensor at a time is read into memory. Return

        the path of the language model's file
        the path of the file with the vision tower and the connector (mmproj)
        [note for the user]"""
    if dtype not in DTYPES:
        stop(f"dtype={dtype}: {', '.join(DTYPES)}")
    model, source = llava.load_model(init=folder, dtype=None)
    cfg, name = model.cfg, Path(folder).resolve().name
    if not is_llava(cfg):
        stop(f"{name}: llama.cpp's LLaVA cannot hold this model (a {family_of(cfg).model_type} folder)")
    keys = text_keys(cfg.text, dtype, name)
    keys |= tokenizer_keys(source.tok, cfg.text.vocab_size, *(source.meta.get(k) for k in ("template", "system")))
    vision_keys = mmproj_keys(cfg, dtype, name)
    out = Path(out or Path(folder if Path(folder).exists() else name, "gguf"))           # hub model: write to NAME/gguf
    out.mkdir(parents=True, exist_ok=True)
    paths = out / f"model-{dtype}.gguf", out / f"mmproj-model-{dtype}.gguf"
    write_gguf(paths[0], keys, partial(text_tensors, model.language_model, cfg.text, dtype))
    write_gguf(paths[1], vision_keys, partial(mmproj_tensors, model, dtype))
    notes = [] if "tokenizer.chat_template" in keys else [
        f"{folder} has no chat template: llama.cpp will use one of its own, which may not fit this model"]
    return *paths, [*notes, *differences(cfg, source)]

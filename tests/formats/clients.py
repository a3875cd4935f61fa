"""What llava.save_model writes, read by transformers alone: each tower, LLM and connector that a LLaVA folder can hold.

    python tests/formats/clients.py write DIR     folders, each with our results (expected.safetensors)
    python tests/formats/clients.py read DIR      any transformers since 4.46: equal keys, pixels, ids, logits, answers?

The two halves share nothing but the folders, so that the reader may be an old one: tests/formats/older_transformers.sh.
"""

import contextlib
import io
import itertools
import json
import sys
import zlib
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

TOWERS = {
    "clip": dict(model_type="clip_vision_model", intermediate_size=48, projection_dim=16),
    "siglip": dict(model_type="siglip_vision_model", intermediate_size=48, layer_norm_eps=1e-6,
                   hidden_act="gelu_pytorch_tanh"),
    "dinov2": dict(model_type="dinov2", mlp_ratio=2, layer_norm_eps=1e-6, hidden_act="gelu", qkv_bias=True)}
DECODERS = {   # with a template that such a model would be given
    "llama": ("vicuna_v1", dict(rope_theta=5e5, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64})),
    "mistral": ("mistral", dict(sliding_window=12)),
    "qwen2": ("chatml", dict(rope_theta=1e6, use_sliding_window=False, sliding_window=9, max_window_layers=2,
                             tie_word_embeddings=True)),
    "qwen3": ("chatml", dict(rope_theta=1e6, head_dim=16, tie_word_embeddings=True))}
ASPECTS, DTYPES = ("crop", "pad", "squash"), (torch.float32, torch.float16, torch.bfloat16)
CASES = ["-".join(c) for c in itertools.product(TOWERS, DECODERS, ("mlp", "linear"))]
SOME = [c for i, c in enumerate(CASES) if i % 4 in (0, 3)]    # each tower with each LLM, connectors in turn
TOWERS["registers"] = TOWERS["dinov2"] | dict(model_type="dinov2_with_registers", num_register_tokens=4)   # refused
QUESTION, SYSTEM, PAD = "What is this?", "Be brief.", 4    # its id in conftest's tokenizers
NEWER = {"qwen3": (4, 51)}    # since this version of transformers; LlavaImageProcessor, which pads, came after 4.46


# ---- write ----------------------------------------------------------------------------------------------------------

def make(case, tok):
    """A random model of one case, as llava.load_model would have read it -> VLM, Folder, template, aspect, dtype"""

    from formats import configs, llava, tokenizer
    from model import VLM, VisionConfig, VLMConfig
    tower, decoder, connector = case.split("-")
    n = zlib.crc32(case.encode())
    template, more = DECODERS[decoder]
    v = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4) | TOWERS[tower]
    t = dict(model_type=decoder, vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=128) | more
    known = {"intermediate_size": 64} | {k: x for k, x in v.items() if k in VisionConfig.__dataclass_fields__}
    dtype = DTYPES[n // 3 % 3]
    torch.manual_seed(n)
    model, whole = (VLM(VLMConfig(VisionConfig(**known, feature_layer=layer), configs.text_config(t), connector, 3))
                    for layer in (-2, -1))
    for name, p in whole.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.2)
        p.data = p.data.to(dtype).float()
    state = whole.state_dict()
    model.load_state_dict({k: state[k] for k in model.state_dict()})
    unused = {k: state[k] for k in state.keys() - model.state_dict().keys()}
    unused |= {f"vision_tower.vision_model.post_layernorm.{k}": torch.ones(32) for k in ("weight", "bias")}
    pre = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3, "do_convert_rgb": True,
           "size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    model.cfg.vision.image_mean, model.cfg.vision.image_std = pre["image_mean"], pre["image_std"]
    return model.eval(), llava.Folder(tokenizer.Tokenizer(tok), v, t, pre, unused, {}), template, ASPECTS[n % 3], dtype


@torch.no_grad()
def write(case, root, tok, **changes):
    """-> root/case, with the answers beside the model"""
    from data import pack
    from formats import card, configs, llava, tensors
    from generate import Chat, generate
    from images import preprocess
    from model import logits_head
    model, folder, template, aspect, dtype = make(case, tok)
    folder = folder._replace(**changes)
    connector, out = case.split("-")[2], Path(root, case)
    with mock.patch.object(tensors, "SHARD", 20_000 if connector == "linear" else tensors.SHARD):
        llava.save_model(out, model.state_dict(), model.cfg, folder, template, SYSTEM, aspect, dtype, card.USE)
    Image.effect_noise((23, 14), 90).convert("RGB").save(out / "image.png")
    asker = Chat.of(model, folder, template, SYSTEM, aspect)
    seen = preprocess(Image.open(out / "image.png"), configs.image_spec(folder.pre, aspect))[None]
    mean, std = (torch.tensor(folder.pre[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    ids = asker.prompt([(f"<image>\n{QUESTION}", None)], [asker.layout.block()])
    batch = pack([(ids.tolist(), [-100] * len(ids), seen)], 8)
    logits = model(*batch._replace(labels=torch.zeros_like(batch.ids)), head=logits_head)
    answer = torch.tensor(generate(model, [ids], seen, asker.stop_ids, 8, banned=asker.banned)[0])
    text = asker.prompt([("Hi", "Yo"), ("And?", None)])
    save_file({"ids": ids, "pixels": (seen / 255 - mean) / std, "logits": logits, "answer": answer, "text": text},
              out / "expected.safetensors")
    return out


# ---- read -----------------------------------------------------------------------------------------------------------

def read(folder):
    """-> a line about what was equal; an AssertionError where something was not"""
    import transformers as T
    folder, want = Path(folder), load_file(Path(folder, "expected.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    version = tuple(int(n) for n in T.__version__.split(".")[:2])
    if version < NEWER.get(config["text_config"]["model_type"], (0,)):
        try:
            T.AutoConfig.from_pretrained(folder)
        except KeyError as e:
            return f"refused, as it must be: {e} is not known to this version"
    model, info = T.LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32,
                                                                  output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    image, ids = Image.open(folder / "image.png"), want["ids"][None]
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=want["pixels"])
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0]
    off = float((logits - want["logits"]).abs().max() / want["logits"].abs().max())
    assert off < 1e-5, off
    answer = model.generate(**inputs, max_new_tokens=8)[0, ids.shape[1]:].tolist()
    stop = model.generation_config.eos_token_id
    answer = [w for w in answer if w not in (stop if isinstance(stop, list) else [stop])]
    assert answer == want["answer"].tolist(), (answer, want["answer"])
    try:
        processor = T.AutoProcessor.from_pretrained(folder)
        saw, tok = "pixels to 1e-6", processor.tokenizer
    except ValueError:                                    # no other may be taken instead: it would crop
        assert version < (4, 57) and "LlavaImageProcessor" in (folder / "preprocessor_config.json").read_text()
        processor, tok = None, T.AutoTokenizer.from_pretrained(folder)
        saw = "its image processor is not known to this version"
    if processor:
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        there = processor(images=image, text=text, return_tensors="pt")
        assert there["input_ids"].tolist() == ids.tolist(), (there["input_ids"], ids)
        torch.testing.assert_close(there["pixel_values"], want["pixels"], rtol=0, atol=1e-6)
    turns = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yo"), ("user", "And?"))]
    text = tok.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert tok(text)["input_ids"] == want["text"].tolist()
    if processor and folder.name.endswith("llama-mlp"):   # what the card says one should type
        printed = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
            exec(Path("README.md").read_text().split("```")[1].removeprefix("python"), {})
        assert printed.getvalue().strip()
    return f"all keys, logits to {off:.0e}, {len(answer)} tokens, chat template, {saw}"


if __name__ == "__main__":
    verb, root = sys.argv[1], Path(sys.argv[2])
    if verb == "write":
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from conftest import make_tokenizer  # it puts this repository on the path
        tok = make_tokenizer(root / "tokenizer")
        for case in CASES:
            write(case, root, tok)
    else:
        import transformers
        for case in CASES:
            print(f"{transformers.__version__}  {case:22} {read(root / case)}", flush=True)

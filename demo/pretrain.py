"""The toy's tongue and eyes, trained from nothing: a small Llama on text of that world, a small ViT on its pictures.

    python demo/pretrain.py tongue [--steps=N --out=DIR]     # -> demo/tongue: config.json, model.safetensors, tokenizer.json
    python demo/pretrain.py eyes   [--steps=N --out=DIR --head=contrastive|classes]    # -> demo/eyes

Stage 1 is meaningful only if the language model can already reason about a scene in words before it can see one, as Vicuna can.
So the tongue learns captions, small talk, and above all questions answered from a *written* scene; it never meets one of the
held-out pairs of a colour and a shape, and is tested on scenes that contain them.
"""

import json
import random
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import toy
from chat import Script, Tokenizer, encode, stop_ids
from data import pack
from engine import lr_at
from model import IGNORE, Llama, TextConfig, VisionConfig, VisionModel, init_weights
from kernels.cross_entropy import linear_cross_entropy

SPECIALS = ["<pad>", "<s>", "</s>", "<image>"]


def settings(**defaults):
    for a in sys.argv[2:]:
        key, _, value = a.removeprefix("--").partition("=")
        if key not in defaults:
            raise SystemExit(f"unknown setting {key!r}: one of {', '.join(defaults)}")
        defaults[key] = type(defaults[key])(value)
    return defaults


# ---- the tokenizer ------------------------------------------------------------------------------------------------------------

def train_tokenizer(folder, vocab=1024, scenes=3000):
    """A byte-level BPE of the toy's words; written as tokenizer.json and tokenizer_config.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    def texts():
        for i in range(scenes):
            rng = random.Random(f"tokenizer/{i}")
            scene = toy.make_scene(rng)
            yield toy.written(scene, rng)
            yield toy.caption(scene, i % 2 == 0)
            for t in toy.conversation(scene, rng, "", short=i % 2 == 0):
                yield f"USER: {t['value']} ASSISTANT: {t['value']}\n"
        for q, a, s in toy.facts():
            yield f"{q} {a} {s}"

    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "model_max_length": 2048, "padding_side": "left", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"]}, indent=2))
    return Tokenizer(folder)


# ---- the tongue ---------------------------------------------------------------------------------------------------------------

def reading(tok, rng, held_out=False):
    """One document of the tongue's schooling -> (ids, labels, no images). Only answers are learnt: a random scene cannot be."""
    def turns(conversation):
        return [(u["value"], a["value"]) for u, a in zip(conversation[::2], conversation[1::2])]

    kind = rng.random()
    scene = toy.make_scene(rng, held_out)
    if kind < 0.82:
        ids, labels = encode(tok, "vicuna_v1", turns(toy.conversation(scene, rng, toy.written(scene, rng) + "\n", turns=10)), 0, 3, 0, system="")
    elif kind < 0.97:
        w = Script(tok, 0)
        w.control(tok.bos)
        if kind < 0.95:
            w.text(toy.written(scene, rng) + "\n")
        w.text(toy.caption(scene, rng.random() < 0.75) + "\n", learn=True)
        ids, labels = w.ids(3, 0)
    else:
        ids, labels = encode(tok, "vicuna_v1", turns(toy.dialogue(rng.sample(toy.facts(), 5), rng.random() < 0.7)), 0, 3, 0, system="")
    return ids, labels, []


@torch.no_grad()
def reading_score(lm, tok, scenes=100, seed="exam"):
    """Exact match per type on written, held-out scenes: each question alone, answered greedily -> {type: share, "all": share}."""
    prompts, answers, kinds = [], [], []
    for i in range(scenes):
        rng = random.Random(f"{seed}/{i}")
        scene = toy.make_scene(rng, held_out=True)
        for kind, q, a, _ in toy.questions(scene, rng, held_out=True):
            ids, _ = encode(tok, "vicuna_v1", [(f"{toy.written(scene, rng)}\n{q}\n{toy.SHORT}", None)], 0, 3, 0, system="")
            prompts.append(ids), kinds.append(kind)
            answers.append(tok.text(" " + a)[0] + [tok.eos])
    right = []
    for p, a in zip(prompts, answers):  # a greedy answer is right if every token of the true one is the first choice after the last
        batch = pack([(p + a, [IGNORE] * len(p) + a, [])], 1)
        x = lm.model.embed_tokens(batch.ids)
        h = lm(x, batch.pos, batch.lo, batch.hi, (batch.labels != IGNORE).nonzero()[:, 0])
        right.append(bool((((h @ lm.head_weight.T).argmax(-1)) == torch.tensor(a)).all()))
    share = {k: sum(r for r, j in zip(right, kinds) if j == k) / kinds.count(k) for k in toy.TYPES}
    return {"all": sum(right) / len(right), **share}


def optimizers(modules, lr, matrix_lr):
    """Muon (Jordan 2024) for the matrices inside the blocks, AdamW for everything else."""
    named = [(n, p) for m in modules for n, p in m.named_parameters()]
    matrices = [p for n, p in named if p.ndim == 2 and "layers." in n]
    rest = [p for n, p in named if not (p.ndim == 2 and "layers." in n)]
    return [torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.01), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def step_all(opts, step, steps, warmup):
    for o in opts:
        for g in o.param_groups:
            g.setdefault("peak", g["lr"])
            g["lr"] = lr_at(step, steps, warmup, g["peak"])
        o.step()
        o.zero_grad(set_to_none=True)


def train_tongue():
    s = settings(steps=10000, docs=24, out=str(HERE / "tongue"), width=128, depth=6, lr=3e-3, matrix_lr=0.01, exam_every=250, minutes=1e9, seed=0)
    out = Path(s["out"])
    tok = train_tokenizer(out)
    cfg = TextConfig(vocab_size=-(-len(tok) // 64) * 64, hidden_size=s["width"], intermediate_size=s["width"] * 11 // 4, num_hidden_layers=s["depth"],
                     num_attention_heads=s["width"] // 32, num_key_value_heads=s["width"] // 64, head_dim=32, rms_norm_eps=1e-5,
                     max_position_embeddings=2048)
    lm = Llama(cfg)
    init_weights(lm, s["seed"])
    with torch.no_grad():
        lm.model.embed_tokens.weight.mul_(35)               # N(0, 0.7): the words should outweigh what untrained blocks add
    opts = optimizers([lm], s["lr"], s["matrix_lr"])
    print(f"tongue: {sum(p.numel() for p in lm.parameters()):,} parameters, {len(tok)} words", flush=True)
    began, log = time.time(), []
    for step in range(s["steps"]):
        rng = random.Random(f"tongue/{s['seed']}/{step}")
        batch = pack([reading(tok, rng) for _ in range(s["docs"])], 1)
        rows = (batch.labels != IGNORE).nonzero()[:, 0]
        with torch.autocast("cpu", torch.bfloat16):
            x = lm.model.embed_tokens(batch.ids).bfloat16()
            loss = linear_cross_entropy(lm(x, batch.pos, batch.lo, batch.hi, rows), lm.head_weight, batch.labels[rows]) / len(rows)
        loss.backward()
        step_all(opts, step, s["steps"], 200)
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f} tokens {len(batch.ids)} minutes {(time.time() - began) / 60:.1f}", flush=True)
        if step % s["exam_every"] == s["exam_every"] - 1 or step == s["steps"] - 1:
            score = reading_score(lm, tok)
            log.append({"step": step + 1, "loss": round(loss.item(), 4), "minutes": round((time.time() - began) / 60, 1),
                        "exam": {k: round(v, 3) for k, v in score.items()}})
            print(log[-1], flush=True)
            save_tongue(out, lm, cfg, {**s, "out": "", "log": log})


def save_tongue(out, lm, cfg, record):
    from safetensors.torch import save_file
    save_file({k: v.to(torch.float16).contiguous() for k, v in lm.state_dict().items()}, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": cfg.vocab_size, "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size, "num_hidden_layers": cfg.num_hidden_layers, "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": cfg.num_key_value_heads, "head_dim": cfg.head_dim, "rms_norm_eps": cfg.rms_norm_eps, "rope_theta": cfg.rope_theta,
        "rope_scaling": None, "hidden_act": "silu", "max_position_embeddings": cfg.max_position_embeddings, "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float16"}, indent=2))
    (out / "training.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["tongue"]:
        train_tongue()
    elif sys.argv[1:2] == ["eyes"]:
        train_eyes()
    else:
        raise SystemExit(__doc__)

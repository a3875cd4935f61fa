"""The toy's tongue and eyes, trained from nothing: a small Llama on text of that world, a small ViT on its pictures.

    python demo/pretrain.py tongue [--steps=N --out=DIR]     # -> demo/tongue: config.json, model.safetensors, tokenizer.json
    python demo/pretrain.py eyes   [--steps=N --out=DIR --head=contrastive|classes]    # -> demo/eyes

Stage 1 is meaningful only if the language model can already reason about a scene in words before it can see one, as Vicuna can.
So the tongue learns captions, small talk, and above all questions answered from a *written* scene; neither tongue nor eyes ever meet
one of the held-out combinations (demo/toy.py), and both are examined on scenes made of nothing else.
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

def reading(tok, rng):
    """One document of the tongue's schooling -> (ids, labels, no images). Only answers are learnt: a random scene cannot be."""
    def turns(conversation):
        return [(u["value"], a["value"]) for u, a in zip(conversation[::2], conversation[1::2])]

    kind, scene = rng.random(), toy.make_scene(rng)
    if kind < 0.68:
        asked = toy.conversation(scene, rng, toy.written(scene, rng) + "\n", turns=10, short=rng.random() < 0.5)
    elif kind < 0.71:
        asked = toy.dialogue(rng.sample(toy.facts(), 5), rng.random() < 0.7)
    else:
        w = Script(tok, 0)
        w.control(tok.bos)
        if kind < 0.90:                                     # the scene said again, three times
            w.text(toy.written(scene, rng) + "\n")
            for _ in range(3):
                w.text(toy.restated(scene, rng) + "\n", learn=True)
        else:                                               # a caption, mostly of a written scene
            w.text(toy.written(scene) + "\n" if kind < 0.98 else "")
            w.text(toy.caption(scene, rng.random() < 0.75) + "\n", learn=True)
        return (*w.ids(3, 0), [])
    return (*encode(tok, "vicuna_v1", turns(asked), 0, 3, 0, system=""), [])


@torch.no_grad()
def reading_score(lm, tok, scenes=100, seed="exam"):
    """Exact match per type on written, held-out scenes: each question alone, answered greedily -> {type: share, "all": share}."""
    prompts, answers, kinds = [], [], []
    for i in range(scenes):
        rng = random.Random(f"{seed}/{i}")
        scene = toy.make_scene(rng, test=True)
        for kind, q, a, _ in toy.questions(scene, rng):
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
    s = settings(steps=20000, docs=8, out=str(HERE / "tongue"), width=128, depth=6, lr=3e-3, matrix_lr=0.01, embed=0.1, exam_every=500, seed=0)
    out = Path(s["out"])
    tok = train_tokenizer(out)
    cfg = TextConfig(vocab_size=-(-len(tok) // 64) * 64, hidden_size=s["width"], intermediate_size=s["width"] * 11 // 4, num_hidden_layers=s["depth"],
                     num_attention_heads=s["width"] // 32, num_key_value_heads=s["width"] // 32, head_dim=32, rms_norm_eps=1e-5,
                     max_position_embeddings=2048, qk_norm=True)
    lm = Llama(cfg)
    init_weights(lm, s["seed"])
    with torch.no_grad():
        lm.model.embed_tokens.weight.mul_(s["embed"] / 0.02)
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
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": cfg.vocab_size, "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size, "num_hidden_layers": cfg.num_hidden_layers, "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": cfg.num_key_value_heads, "head_dim": cfg.head_dim, "rms_norm_eps": cfg.rms_norm_eps, "rope_theta": cfg.rope_theta,
        "rope_scaling": None, "hidden_act": "silu", "max_position_embeddings": cfg.max_position_embeddings, "attention_bias": False,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float16"}, indent=2))
    (out / "training.json").write_text(json.dumps(record, indent=1))


# ---- the eyes -----------------------------------------------------------------------------------------------------------------

EYES = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=toy.SIDE, patch_size=12)
LABELS = {"color": [*toy.COLORS], "shape": toy.SHAPES, "size": toy.SIZES, "digit": list(range(10))}  # what may be seen in a cell


class Eyes(torch.nn.Module):
    """A whole ViT (all blocks) and what its schooling needs: for "contrastive" a text encoder and two projections, as in CLIP; for
    "classes" one linear layer that names what stands in each of the nine cells, from the four patches of the cell."""

    def __init__(self, head, words):
        super().__init__()
        self.head, D = head, EYES["hidden_size"]
        self.vision_model = VisionModel(VisionConfig(**EYES, feature_layer=EYES["num_hidden_layers"]))
        self.vision_model.post_layernorm = torch.nn.LayerNorm(D, eps=1e-5)
        if head == "contrastive":
            self.reader = Llama(TextConfig(vocab_size=words, hidden_size=D, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
                                           num_key_value_heads=4, head_dim=32, tie_word_embeddings=True))
            self.visual_projection, self.text_projection = (torch.nn.Linear(D, D, bias=False) for _ in range(2))
            self.logit_scale = torch.nn.Parameter(torch.tensor(2.6592))  # log(1 / 0.07), Radford et al. 2021
        else:
            self.classes = torch.nn.Linear(D, sum(len(v) + 1 for v in LABELS.values()))

    def cells(self, features):
        """(I, P, D) -> (I, 9, D): mean over the patches of a cell."""
        n = toy.SIDE // EYES["patch_size"] // 3
        return features.unflatten(1, (3, n, 3, n)).mean((2, 4)).flatten(1, 2)

    def forward(self, images, captions, seen):
        """Summed loss of one batch. captions: a packed Batch of as many documents; seen (I, 9, 4) class per cell and kind."""
        x = self.vision_model.post_layernorm(self.vision_model(images))           # (I, T, D)
        if self.head == "classes":
            logits = self.classes(self.cells(x[:, 1:])).float().split([len(v) + 1 for v in LABELS.values()], dim=-1)
            return sum(torch.nn.functional.cross_entropy(l.flatten(0, 1), seen[:, :, i].flatten()) for i, l in enumerate(logits))
        ends = torch.cat([captions.lo[1:] != captions.lo[:-1], torch.tensor([True])]).nonzero()[:, 0]
        t = self.reader(self.reader.model.embed_tokens(captions.ids), captions.pos, captions.lo, captions.hi, ends)
        x, t = (torch.nn.functional.normalize(f.float(), dim=-1) for f in (self.visual_projection(x[:, 0]), self.text_projection(t)))
        logits = self.logit_scale.clamp(max=4.6).exp() * x @ t.T                  # (I, I)
        target = torch.arange(len(x))
        return (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2


def twin(scene, rng):
    """The scene with one thing changed: its colour, its shape, its size or its place."""
    while True:
        new = json.loads(json.dumps(scene))
        o, change = rng.choice(new["objects"]), rng.choice(["color", "shape", "size", "place"])
        if change == "place":
            taken = {(x["row"], x["column"]) for x in toy.things(scene)}
            o["row"], o["column"] = rng.choice([(r, k) for r in range(3) for k in range(3) if (r, k) not in taken])
        else:
            o[change] = rng.choice({"color": [*toy.COLORS], "shape": toy.SHAPES, "size": toy.SIZES}[change])
        new["objects"].sort(key=lambda x: (x["row"], x["column"]))
        pairs = {toy.pair(x) for x in new["objects"]}
        if new != scene and len(pairs) == len(new["objects"]) and not any(toy.held_out(**x) for x in new["objects"]):
            return new


def sights(n, seed, test=False):
    """n scenes, each second one a near twin of the one before (one thing changed): -> images (n, 3, S, S), captions, seen (n, 9, 4)."""
    import numpy as np
    images, captions, seen = [], [], torch.zeros(n, 9, 4, dtype=torch.long)
    for i in range(n):
        rng = random.Random(f"sight/{seed}/{i}")
        if i % 2 == 0 or test:
            scene = toy.make_scene(rng, test)
        else:
            scene = twin(scene, rng)
        images.append(torch.from_numpy(np.array(toy.draw(scene, rng.getrandbits(32)))).permute(2, 0, 1))
        captions.append(toy.caption(scene, True))
        for o in toy.things(scene):
            for k, names in enumerate(LABELS):
                if names in o:
                    seen[i, 3 * o["row"] + o["column"], k] = 1 + LABELS[names].index(o[names])
    return torch.stack(images), captions, seen


def probe(eyes, train, test, layer):
    """How much a linear reader sees in the features of one layer: share of attributes of *present* things named right in held-out
    scenes, per kind. Ridge regression on the cell's patches, side by side; the eyes stay as they are."""
    n = toy.SIDE // EYES["patch_size"] // 3

    @torch.no_grad()
    def features(images):
        v, out = eyes.vision_model, []
        for part in images.split(500):
            kept = []
            hook = v.encoder.layers[layer].register_forward_hook(lambda m, i, o: kept.append(o))
            v(part)
            hook.remove()
            f = kept[0].view(len(part), -1, EYES["hidden_size"])[:, 1:].unflatten(1, (3, n, 3, n))
            out.append(f.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2))       # (I, 9, n n D)
        f = torch.cat(out).flatten(0, 1).double()
        return torch.cat([f, torch.ones(len(f), 1, dtype=torch.float64)], 1)

    a, b = features(train[0]), features(test[0])
    score = {}
    for k, (name, values) in enumerate(LABELS.items()):
        y = torch.nn.functional.one_hot(train[2][:, :, k].flatten(), len(values) + 1).double()
        w = torch.linalg.solve(a.T @ a + 1e-2 * len(a) * torch.eye(a.shape[1], dtype=torch.float64) * 1e-3, a.T @ y)
        truth = test[2][:, :, k].flatten()
        score[name] = round(((b @ w).argmax(1) == truth)[truth > 0].double().mean().item(), 3)
    return score


def train_eyes():
    s = settings(steps=3000, batch=96, scenes=16000, out=str(HERE / "eyes"), head="contrastive", lr=1e-3, matrix_lr=0.01, exam_every=500, seed=0,
                 tongue=str(HERE / "tongue"))
    assert s["head"] in ("contrastive", "classes"), s["head"]
    out = Path(s["out"])
    out.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer(s["tongue"])
    eyes = Eyes(s["head"], -(-len(tok) // 64) * 64)
    init_weights(eyes, s["seed"])
    if s["head"] == "contrastive":
        with torch.no_grad():
            eyes.logit_scale.fill_(2.6592)
    opts = optimizers([eyes], s["lr"], s["matrix_lr"])
    began, log = time.time(), []
    images, captions, seen = sights(s["scenes"], s["seed"])
    exam, test = tuple(x[:3000] for x in (images, captions, seen)), sights(600, "exam", test=True)
    docs = [([tok.bos, *tok.text(c)[0], tok.eos],) for c in captions]
    print(f"eyes: {sum(p.numel() for p in eyes.vision_model.parameters()):,} parameters, drawn in {time.time() - began:.0f} s", flush=True)
    g = torch.Generator().manual_seed(s["seed"])
    for step in range(s["steps"]):
        i = torch.randint(0, s["scenes"] // 2, (s["batch"] // 2,), generator=g) * 2
        i = torch.stack([i, i + 1], 1).flatten().tolist()                          # each with its twin
        batch = pack([(docs[j][0], docs[j][0], []) for j in i], 1)
        pixels, truth = images[i], seen[i]
        if s["head"] == "classes":                          # shapes should not be told by colours: a third is seen in grey, its colours not asked
            grey = torch.rand(len(i), generator=g) < 1 / 3
            pixels[grey] = pixels[grey].float().mean(1, keepdim=True).to(torch.uint8).expand(-1, 3, -1, -1)
            truth[grey, :, 0] = IGNORE
        with torch.autocast("cpu", torch.bfloat16):
            loss = eyes(pixels, batch, truth)
        loss.backward()
        step_all(opts, step, s["steps"], 100)
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f} minutes {(time.time() - began) / 60:.1f}", flush=True)
        if step % s["exam_every"] == s["exam_every"] - 1 or step == s["steps"] - 1:
            score = {str(j): probe(eyes, exam, test, j) for j in (-2, -1)}  # of the last two blocks: LLaVA reads the one before the last
            log.append({"step": step + 1, "loss": round(loss.item(), 4), "minutes": round((time.time() - began) / 60, 1), "probe": score})
            print(log[-1], flush=True)
            save_eyes(out, eyes, {**s, "out": "", "tongue": "", "log": log})


def save_eyes(out, eyes, record):
    from safetensors.torch import save_file
    state = {k: v.to(torch.float16).contiguous() for k, v in eyes.state_dict().items() if k.startswith("vision_model.")}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps({"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **EYES, "num_channels": 3,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": EYES["hidden_size"], "torch_dtype": "float16"}, indent=2))
    side, v = EYES["image_size"], VisionConfig()
    (out / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": side}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(v.image_mean), "image_std": list(v.image_std), "do_convert_rgb": True}, indent=2))
    (out / "training.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["tongue"]:
        train_tongue()
    elif sys.argv[1:2] == ["eyes"]:
        train_eyes()
    else:
        raise SystemExit(__doc__)

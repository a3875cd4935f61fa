"""The toy's tongue and eyes, trained from nothing: a small Llama and a small ViT.

    python demo/pretrain.py tongue [--steps=N --out=DIR ...]      # -> demo/llm: config, weights, tokenizer
    python demo/pretrain.py eyes [--head=contrastive|classes ...] # -> demo/vit: config, weights, preprocessing

Stage 1 is meaningful only if the language model can reason about a scene in words before it can see one, as Vicuna can.
So the tongue learns captions, small talk, and above all questions answered from a *written* scene. Neither tongue nor
eyes ever meet one of the held-out combinations (demo/toy.py); both are examined on scenes made of nothing else.
training.json in each folder holds the settings, the exams on the way, and the minutes they took.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import config
from run import folder
import lessons  # noqa: E402
import toy  # noqa: E402
from chat import encode
from formats.tokenizer import Tokenizer
from data import pack
from engine import lr_at
from kernels.cross_entropy import linear_cross_entropy  # noqa: E402
from kernels.cross_entropy import IGNORE
from model import init_weights, Llama, TextConfig, VisionConfig, VisionModel

SPECIALS = ["<pad>", "<s>", "</s>", "<image>"]  # ids 0, 1, 2, 3


def settings(**defaults):
    for a in sys.argv[2:]:
        key, _, value = a.removeprefix("--").partition("=")
        if key not in defaults:
            raise SystemExit(f"error: unknown setting {key!r}: one of {', '.join(defaults)}")
        defaults[key] = config.read_value(value, type(defaults[key]), key)
    counts = dict.fromkeys(("steps", "scenes", "exam_every", "exam", "tokens", "depth"), (1, None))
    config.within(SimpleNamespace(**defaults), counts | {"batch": (2, None), "width": (32, None)})
    if problem := folder.unwritable(defaults["out"]):
        config.stop(f"out={defaults['out']}: {problem}")
    return defaults


def optimizers(model, lr, matrix_lr):
    """Muon (Jordan 2024) for the matrices inside the blocks, AdamW for everything else."""
    inside = {n: p.ndim == 2 and "layers." in n for n, p in model.named_parameters()}
    matrices, rest = ([p for n, p in model.named_parameters() if inside[n] == want] for want in (True, False))
    return [torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def update(opts, step, steps, warmup=100, hold=0):
    """One step of all optimizers; the learning rate stays at its peak for `hold` steps after the warm-up."""
    at = step if step < warmup else max(warmup, step - hold)
    for o in opts:
        for g in o.param_groups:
            g["lr"] = lr_at(at, steps - hold, warmup, g.setdefault("peak", g["lr"]))
        o.step()
        o.zero_grad(set_to_none=True)


def record(out, s, log):
    """training.json: settings, exams, and on what machine."""
    cpu = next((line.split(": ")[1] for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    kept = {k: v for k, v in s.items() if k not in ("out", "tongue")}
    made = dict(settings=kept, torch=torch.__version__, cpu=cpu.strip(), threads=torch.get_num_threads(), log=log)
    (out / "training.json").write_text(json.dumps(made, indent=1))


# ---- the tokenizer --------------------------------------------------------------------------------------------------

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
            yield " " + "\n ".join(sum(lessons.drill(rng, easy=False)[1], ()))
            for t in toy.conversation(scene, rng, "", short=i % 2 == 0):
                yield f"USER: {t['value']} ASSISTANT: {t['value']}\n"
        for q, a, s in toy.facts():
            yield f"{q} {a} {s}"

    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "model_max_length": 2048, "padding_side": "left", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"]}, indent=2))
    return Tokenizer(folder)


# ---- the tongue -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def reading_score(lm, tok, scenes=100, seed="exam"):
    """Exact match per type on written, held-out scenes, each question alone -> {"all": share, type: share}. A greedy
    answer is right if every token of the true one is the first choice after those before it."""
    right = {}
    for i in range(scenes):
        rng = random.Random(f"{seed}/{i}")
        scene = toy.make_scene(rng, test=True)
        for kind, q, a, _ in toy.questions(scene, rng):
            turns = [(f"{toy.written(scene, rng)}\n{q}\n{toy.SHORT}", None)]
            prompt, _ = encode(tok, "vicuna_v1", turns, 0, 3, 0, system="")
            answer = tok.text(" " + a)[0] + [tok.eos]
            b = pack([(prompt + answer, [IGNORE] * len(prompt) + answer, [])], 1)
            rows = (b.labels != IGNORE).nonzero()[:, 0]
            h = lm(lm.model.embed_tokens(b.ids), b.pos, b.lo, b.hi, rows)
            right.setdefault(kind, []).append(bool((h @ lm.head_weight.T).argmax(-1).equal(b.labels[rows])))
    every = [r for kind in toy.TYPES for r in right[kind]]
    return {"all": sum(every) / len(every), **{k: sum(right[k]) / len(right[k]) for k in toy.TYPES}}


def train_tongue():
    s = settings(pairs=700, records=3000, questions=6000, tokens=2048, width=128, depth=4, lr=3e-3, matrix_lr=0.005,
                 embed=0.7, residual=0.3, exam_every=1000, exam=100, seed=0, out=str(HERE / "llm"))
    out, heads = Path(s["out"]), s["width"] // 32
    plan = [name for name in ("pairs", "records", "questions") for _ in range(s[name])]
    tok = train_tokenizer(out)
    cfg = TextConfig(vocab_size=-(-len(tok) // 64) * 64, hidden_size=s["width"],
                     intermediate_size=s["width"] * 11 // 4, num_hidden_layers=s["depth"], num_attention_heads=heads,
                     num_key_value_heads=heads, head_dim=32, rms_norm_eps=1e-5, max_position_embeddings=2048)
    lm = Llama(cfg)
    init_weights(lm, s["seed"])
    g = torch.Generator().manual_seed(s["seed"])
    with torch.no_grad():
        lm.model.embed_tokens.weight.mul_(s["embed"] / 0.02)
        for layer in lm.model.layers:
            for p in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):  # not 0 as elsewhere: learns sooner
                p.copy_(torch.randn(p.shape, generator=g) * s["residual"] * p.shape[1] ** -0.5)
    opts = optimizers(lm, s["lr"], s["matrix_lr"])
    print(f"tongue: {sum(p.numel() for p in lm.parameters()):,} parameters, {len(tok)} words", flush=True)
    began, log = time.time(), []
    for step, name in enumerate(plan):
        rng, docs = random.Random(f"tongue/{s['seed']}/{step}"), []
        while sum(len(d[0]) for d in docs) < s["tokens"]:
            docs.append(lessons.lesson(name, tok, rng))
        b = pack(docs, 1)
        rows = (b.labels != IGNORE).nonzero()[:, 0]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = lm(lm.model.embed_tokens(b.ids).bfloat16(), b.pos, b.lo, b.hi, rows)
            loss = linear_cross_entropy(hidden, lm.head_weight, b.labels[rows]) / len(rows)
        loss.backward()
        update(opts, step, len(plan), hold=s["pairs"] + s["records"])
        if step % 100 == 0:
            print(f"step {step} {name} loss {loss.item():.4f} minutes {(time.time() - began) / 60:.1f}", flush=True)
        if (step + 1) % s["exam_every"] == 0 or step + 1 == len(plan):
            score = {k: round(v, 3) for k, v in reading_score(lm, tok, s["exam"]).items()}
            log.append(dict(step=step + 1, minutes=round((time.time() - began) / 60, 1), loss=round(loss.item(), 4),
                            exam=score))
            print(log[-1], flush=True)
            save(out, lm.state_dict(), {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": cfg.vocab_size,
                "hidden_size": cfg.hidden_size, "intermediate_size": cfg.intermediate_size, "hidden_act": "silu",
                "num_hidden_layers": cfg.num_hidden_layers, "num_attention_heads": heads, "num_key_value_heads": heads,
                "head_dim": cfg.head_dim, "rms_norm_eps": cfg.rms_norm_eps, "rope_theta": cfg.rope_theta,
                "rope_scaling": None, "max_position_embeddings": cfg.max_position_embeddings, "attention_bias": False,
                "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
                "pad_token_id": 0, "torch_dtype": "float16"})
            record(out, s, log)


def save(out, state, config):
    state = {k: v.to(torch.float16).contiguous() for k, v in state.items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    os.chmod(out / "model.safetensors", 0o644)
    (out / "config.json").write_text(json.dumps(config, indent=2))


# ---- the eyes -------------------------------------------------------------------------------------------------------

EYES = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=toy.SIDE,
            patch_size=12)
LABELS = {"color": [*toy.COLORS], "shape": toy.SHAPES, "size": toy.SIZES, "digit": [*range(10)],  # what a cell may show
          "row": [*range(3)], "column": [*range(3)]}  # and where: else no patch has a reason to know its place
PER_CELL = toy.SIDE // EYES["patch_size"] // 3  # patches along a cell's side
CELLS = torch.arange(9).view(3, 1, 3, 1).expand(3, PER_CELL, 3, PER_CELL).flatten()  # (T,) cell of each patch


class Eyes(torch.nn.Module):
    """A whole ViT (all blocks) and what its schooling needs: for "contrastive" a text encoder and two projections, as
    in CLIP (Radford et al. 2021); for "classes" one linear layer that names, from each patch, what stands in its cell,
    and which cell that is; from the block before the last, which LLaVA reads, as well as from the last. (From the last
    alone, only 62 % of digits could be told from one patch of the one before, and stage 2 learnt them last.)

    After the same 2,000 steps of 96 scenes, one seed each, a linear reader of features of held-out scenes (`probe`,
    block -2) finds of colours, shapes, sizes, digits, rows and columns 100, 99.7, 100, 100, 100 and 100 % after
    "classes" (demo/vit/training.json); 99.8, 82.4, 99.5, 89.3, 34.8 and 36.5 % after "contrastive" (contrastive.json
    beside it; its minutes are those of a crowded machine): a batch of captions seldom hangs on one digit, and the class
    token alone is compared, so no patch needs to know its place. Hence "classes"."""

    def __init__(self, head, words):
        super().__init__()
        self.head, D = head, EYES["hidden_size"]
        self.vision_model = VisionModel(VisionConfig(**EYES, feature_layer=EYES["num_hidden_layers"]))
        self.vision_model.post_layernorm = torch.nn.LayerNorm(D, eps=1e-5)
        if head == "contrastive":
            self.reader = Llama(TextConfig(vocab_size=words, hidden_size=D, intermediate_size=352, num_hidden_layers=2,
                                           num_attention_heads=4, num_key_value_heads=4, head_dim=32,
                                           tie_word_embeddings=True))
            self.visual_projection, self.text_projection = (torch.nn.Linear(D, D, bias=False) for _ in range(2))
            self.logit_scale = torch.nn.Parameter(torch.full((1,), 2.6592))  # log(1 / 0.07)
        else:
            self.classes = torch.nn.Linear(D, sum(len(v) + 1 for v in LABELS.values()))
            self.vision_model.encoder.layers[-2].register_forward_hook(lambda m, i, o: setattr(self, "early", o))

    def forward(self, images, captions, seen):
        """Mean loss of a batch. captions: a packed Batch of as many documents; seen (I, 9, kinds): a class each."""
        x = self.vision_model.post_layernorm(self.vision_model(images))                 # (I, T, D)
        if self.head == "classes":
            early, seen = self.vision_model.post_layernorm(self.early.view(x.shape)), seen[:, CELLS].repeat(2, 1, 1)
            logits = self.classes(torch.cat([x, early])[:, 1:]).float()                 # (2 I, P, classes)
            return sum(F.cross_entropy(z.flatten(0, 1), seen[:, :, i].flatten())
                       for i, z in enumerate(logits.split([len(v) + 1 for v in LABELS.values()], dim=-1)))
        ends = torch.cat([captions.lo[1:] != captions.lo[:-1], torch.tensor([True])]).nonzero()[:, 0]
        words = self.reader.model.embed_tokens(captions.ids)
        t = self.text_projection(self.reader(words, captions.pos, captions.lo, captions.hi, ends))  # (I, D)
        x, t = (F.normalize(f.float(), dim=-1) for f in (self.visual_projection(x[:, 0]), t))
        logits = self.logit_scale.clamp(max=4.6).exp() * x @ t.T                        # (I, I)
        target = torch.arange(len(x))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def twin(scene, rng):
    """The scene with one thing changed: its colour, its shape, its size or its place."""
    while True:
        new = json.loads(json.dumps(scene))
        o, change = rng.choice(new["objects"]), rng.choice(["color", "shape", "size", "place"])
        if change == "place":
            taken = {(x["row"], x["column"]) for x in toy.things(scene)}
            free = [(r, k) for r in range(3) for k in range(3) if (r, k) not in taken]
            o["row"], o["column"] = rng.choice(free)
        else:
            o[change] = rng.choice({"color": [*toy.COLORS], "shape": toy.SHAPES, "size": toy.SIZES}[change])
        new["objects"].sort(key=lambda x: (x["row"], x["column"]))
        pairs = {toy.pair(x) for x in new["objects"]}
        if new != scene and len(pairs) == len(new["objects"]) and not any(toy.held_out(**x) for x in new["objects"]):
            return new


def sights(n, seed, test=False):
    """n scenes; in training each second one is a twin of the one before, a hard negative for the contrastive loss.
    -> images (n, 3, S, S) uint8, captions, seen (n, 9, kinds)"""
    images, captions, seen = [], [], torch.zeros(n, 9, len(LABELS), dtype=torch.long)
    scene = None  # the one before
    for i in range(n):
        rng = random.Random(f"sight/{seed}/{i}")
        scene = toy.make_scene(rng, test, 0.4 if test else 0.8) if i % 2 == 0 or test else twin(scene, rng)
        images.append(torch.from_numpy(np.array(toy.draw(scene, rng.getrandbits(32)))).permute(2, 0, 1))
        captions.append(toy.caption(scene, True))
        for o in toy.things(scene):
            for k, names in enumerate(LABELS):
                if names in o:
                    seen[i, 3 * o["row"] + o["column"], k] = 1 + LABELS[names].index(o[names])
    return torch.stack(images), captions, seen


@torch.no_grad()
def probe(eyes, train, test, layer):
    """How much a linear reader sees in the output of one block: share of attributes of *present* things named right in
    held-out scenes, per kind. Ridge regression on the patches of a cell, side by side; the eyes stay as they are."""
    def features(images):
        out = []
        for part in images.split(500):
            kept = []
            hook = eyes.vision_model.encoder.layers[layer].register_forward_hook(lambda m, i, o: kept.append(o))
            eyes.vision_model(part)
            hook.remove()
            f = kept[0].view(len(part), -1, EYES["hidden_size"])[:, 1:].unflatten(1, (3, PER_CELL, 3, PER_CELL))
            out.append(f.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(0, 2))             # (9 I, patches of a cell * D)
        f = torch.cat(out).double()
        return torch.cat([f, torch.ones(len(f), 1, dtype=torch.float64)], 1)

    a, b = features(train[0]), features(test[0])
    gram = a.T @ a + 1e-5 * len(a) * torch.eye(a.shape[1], dtype=torch.float64)
    score = {}
    for k, (name, values) in enumerate(LABELS.items()):
        y = F.one_hot(train[2][:, :, k].flatten(), len(values) + 1).double()
        guess, truth = (b @ torch.linalg.solve(gram, a.T @ y)).argmax(1), test[2][:, :, k].flatten()
        score[name] = round((guess == truth)[truth > 0].double().mean().item(), 3)
    return score


def train_eyes():
    s = settings(steps=2000, batch=96, scenes=16000, head="classes", lr=1e-3, matrix_lr=0.01, exam_every=500, exam=600,
                 seed=0, out=str(HERE / "vit"), tongue=str(HERE / "llm"))
    if s["head"] not in ("contrastive", "classes"):
        raise SystemExit(f"error: head={s['head']}: contrastive or classes")
    out = Path(s["out"])
    out.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer(s["tongue"])
    eyes = Eyes(s["head"], -(-len(tok) // 64) * 64)
    init_weights(eyes, s["seed"])
    if s["head"] == "contrastive":
        torch.nn.init.constant_(eyes.logit_scale, 2.6592)
    opts = optimizers(eyes, s["lr"], s["matrix_lr"])
    began, log = time.time(), []
    images, captions, seen = sights(s["scenes"], s["seed"])
    exam, test = tuple(x[:3000] for x in (images, captions, seen)), sights(s["exam"], "exam", test=True)
    docs = [[tok.bos, *tok.text(c)[0], tok.eos] for c in captions]
    n = sum(p.numel() for p in eyes.vision_model.parameters())
    print(f"eyes: {n:,} parameters, {s['scenes']} scenes drawn in {time.time() - began:.0f} s", flush=True)
    g = torch.Generator().manual_seed(s["seed"])
    for step in range(s["steps"]):
        i = torch.randint(0, s["scenes"] // 2, (s["batch"] // 2,), generator=g) * 2
        i = torch.stack([i, i + 1], 1).flatten().tolist()                               # each with its twin
        pixels, truth = images[i], seen[i]
        if s["head"] == "classes":    # a shape should not be told by its colour: a third is grey, colours not asked
            grey = torch.rand(len(i), generator=g) < 1 / 3
            pixels[grey] = pixels[grey].float().mean(1, keepdim=True).to(torch.uint8).expand(-1, 3, -1, -1)
            truth[grey, :, 0] = IGNORE
        with torch.autocast("cpu", torch.bfloat16):
            loss = eyes(pixels, pack([(docs[j], docs[j], []) for j in i], 1), truth)
        loss.backward()
        update(opts, step, s["steps"])
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.4f} minutes {(time.time() - began) / 60:.1f}", flush=True)
        if (step + 1) % s["exam_every"] == 0 or step + 1 == s["steps"]:
            # of the last two blocks: LLaVA reads the one before the last
            score = {str(layer): probe(eyes, exam, test, layer) for layer in (-2, -1)}
            log.append(dict(step=step + 1, minutes=round((time.time() - began) / 60, 1), loss=round(loss.item(), 4),
                            probe=score))
            print(log[-1], flush=True)
            state = {k: v for k, v in eyes.state_dict().items() if k.startswith("vision_model.")}
            save(out, state, {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **EYES,
                              "num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
                              "projection_dim": EYES["hidden_size"], "torch_dtype": "float16"})
            side, v = EYES["image_size"], VisionConfig()
            (out / "preprocessor_config.json").write_text(json.dumps({
                "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": side},
                "resample": 3, "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True,
                "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(v.image_mean),
                "image_std": list(v.image_std), "do_convert_rgb": True}, indent=2))
            record(out, s, log)


if __name__ == "__main__":
    if sys.argv[1:2] == ["tongue"]:
        train_tongue()
    elif sys.argv[1:2] == ["eyes"]:
        train_eyes()
    else:
        raise SystemExit(__doc__)

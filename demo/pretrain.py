"""Train the two towers of the toy world from random weights: a small Llama (LLM) and a small ViT.

    python demo/pretrain.py llm [--out=DIR ...]  # -> demo/llm: config, weights, tokenizer
    python demo/pretrain.py vit [--out=DIR ...]  # -> demo/vit: config, weights, preprocessing

Later, stage 1 trains only the connector between both towers. This works only if the LLM can already answer questions
about a scene that it reads as text. So the LLM is trained on such texts and questions (demo/lessons.py). Test scenes
have combinations of attributes that no training scene has (demo/toy.py). Scores are measured on test scenes. The file
training.json in each folder holds the settings, the scores during training, and the training time in minutes.

    I  images      T  tokens of an image: class token + patches      D  width of the ViT      S  image side in pixels
    N  tokens of a packed sequence      R  supervised tokens      K  kinds of attributes, the keys of CLASSES

train_pairs.py trains a ViT of this size on captions instead.
"""

import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import config
from chat import encode
from config import setting
from data import pack
from demo import lessons, toy
from engine import lr_at
from formats.tokenizer import Tokenizer
from kernels.cross_entropy import IGNORE, linear_cross_entropy
from model import Llama, TextConfig, VisionConfig, VisionModel
from parts.init import init_weights
from run.arguments import parse

SPECIALS = ["<pad>", "<s>", "</s>", "<image>"]  # ids 0, 1, 2, 3


@dataclass
class LLMSettings:
    pairs: int = setting(700, "steps of this lesson", 0)
    records: int = setting(3000, "steps of this lesson", 0)
    questions: int = setting(6000, "steps of this lesson", 1)
    tokens: int = setting(2048, "per step, at least", 1)
    width: int = setting(128, "multiple of 32, the head size", 32)
    depth: int = setting(4, "decoder blocks", 1)
    lr: float = setting(3e-3, "peak learning rate of AdamW: embeddings, heads, norms, biases")
    matrix_lr: float = setting(0.005, "peak learning rate of Muon: matrices inside the blocks")
    embed: float = setting(0.7, "standard deviation of the first token embeddings")
    residual: float = setting(0.3, "scale of the first output matrices of attention and MLP")
    exam_every: int = setting(1000, "steps between scores", 1)
    exam: int = setting(100, "held-out scenes of a score", 1)
    seed: int = setting(0, "of the initial weights and the data")
    out: str = setting(str(HERE / "llm"), "folder to write")


@dataclass
class ViTSettings:
    steps: int = setting(2000, "optimizer steps", 1)
    batch: int = setting(96, "images per step", 2)
    scenes: int = setting(16000, "training scenes; the images stay in memory", 2)
    lr: float = setting(1e-3, "peak learning rate of AdamW: embeddings, heads, norms, biases")
    matrix_lr: float = setting(0.01, "peak learning rate of Muon: matrices inside the blocks")
    exam_every: int = setting(500, "steps between scores", 1)
    exam: int = setting(600, "held-out scenes of a score", 1)
    seed: int = setting(0, "of the initial weights and the data")
    out: str = setting(str(HERE / "vit"), "folder to write")


def make_folder(s):
    """Check the settings s and create the folder s.out -> its Path"""
    config.check_ranges(s)
    try:
        Path(s.out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        config.stop(f"out={s.out}: {e.strerror or e}")
    return Path(s.out)


def make_optimizers(model, lr, matrix_lr):
    """Make two optimizers: Muon (Jordan 2024) for the matrices inside the blocks, AdamW for all other parameters."""
    inside = {n: p.ndim == 2 and "layers." in n for n, p in model.named_parameters()}
    matrices, rest = ([p for n, p in model.named_parameters() if inside[n] == want] for want in (True, False))
    return [torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def update(optimizers, step, steps, warmup=100, hold=0):
    """Make one step with each optimizer. The learning rate rises linearly, stays at its peak for `hold` steps, and then
    falls towards 0 along half a cosine."""
    at = step if step < warmup else max(warmup, step - hold)
    for o in optimizers:
        for g in o.param_groups:
            g["lr"] = lr_at(at, steps - hold, warmup, g.setdefault("peak", g["lr"]))
        o.step()
        o.zero_grad(set_to_none=True)


def train(model, s, out, steps, hold, loss_of_step, score, about, prefix=""):
    """Train one tower: the loop over the steps.

    hold            number of steps at the peak learning rate
    loss_of_step    function that returns the loss (a scalar) of a step
    score           function that returns a dict of scores, which are written to training.json
    about           content of config.json
    prefix          only tensors whose names begin with it are saved"""
    optimizers, began, log = make_optimizers(model, s.lr, s.matrix_lr), time.time(), []
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of_step(step)
        loss.backward()
        update(optimizers, step, steps, hold=hold)
        row = dict(step=step + 1, minutes=round((time.time() - began) / 60, 1), loss=round(loss.item(), 4))
        if (step + 1) % s.exam_every == 0 or step + 1 == steps:
            log.append(row | score())
            save(out, {k: v for k, v in model.state_dict().items() if k.startswith(prefix)}, about, s, log)
            print(log[-1], flush=True)
        elif step % 100 == 0:
            print(row, flush=True)


def save(out, state, about, s, log):
    """Write model.safetensors (fp16), config.json and training.json."""
    state = {k: v.to(torch.float16).contiguous() for k, v in state.items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    os.chmod(out / "model.safetensors", 0o644)
    (out / "config.json").write_text(json.dumps(about, indent=2))
    cpu = next((line.split(": ")[1] for line in open("/proc/cpuinfo") if line.startswith("model name")), "?").strip()
    settings = {k: v for k, v in asdict(s).items() if k != "out"}
    (out / "training.json").write_text(json.dumps(dict(
        settings=settings, torch=torch.__version__, cpu=cpu, threads=torch.get_num_threads(), log=log), indent=1))


# ---- the tokenizer --------------------------------------------------------------------------------------------------

def train_tokenizer(folder, vocab=1024, scenes=3000):
    """Train a byte-level BPE tokenizer on texts of the toy world, and write its two files -> Tokenizer"""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    def texts():
        for i in range(scenes):
            rng = random.Random(f"tokenizer/{i}")
            scene = toy.make_scene(rng)
            yield toy.scene_text(scene, rng)
            yield toy.caption(scene, i % 2 == 0)
            yield " " + "\n ".join(sum(lessons.drill(rng, easy=False)[1], ()))
            for t in toy.scene_conversation(scene, rng, "", short=i % 2 == 0):
                yield f"USER: {t['value']} ASSISTANT: {t['value']}\n"
        for q, a, s in toy.general_questions():
            yield f"{q} {a} {s}"

    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "model_max_length": 2048, "padding_side": "left", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"]}, indent=2))
    return Tokenizer(folder)


# ---- the LLM --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def reading_score(lm, tok, scenes=100, seed="exam"):
    """Ask the LLM about the text of held-out scenes -> {type of question, or "all": share of right answers}.

    An answer is right if greedy decoding would generate it. This is tested in one forward pass over the true answer:
    each of its tokens must be the most likely one after the true tokens before it."""
    right = {}
    for i in range(scenes):
        rng = random.Random(f"{seed}/{i}")
        scene = toy.make_scene(rng, test=True)
        for kind, q, a, _ in toy.scene_questions(scene, rng):
            turns = [(f"{toy.scene_text(scene, rng)}\n{q}\n{toy.SHORT}", None)]
            prompt, _ = encode(tok, "vicuna_v1", turns, system="")
            answer = tok.text(" " + a)[0] + [tok.eos]
            b = pack([(prompt + answer, [IGNORE] * len(prompt) + answer, [])], 1)
            rows = (b.labels != IGNORE).nonzero()[:, 0]                                       # (R,)
            h = lm(lm.model.embed_tokens(b.ids), b.pos, b.lo, b.hi, rows)
            right.setdefault(kind, []).append(bool((h @ lm.head_weight.T).argmax(-1).equal(b.labels[rows])))
    every = [r for kind in toy.TYPES for r in right[kind]]
    return {"all": sum(every) / len(every), **{k: sum(right[k]) / len(right[k]) for k in toy.TYPES}}


def train_llm(s):
    out, heads = make_folder(s), s.width // 32
    plan = [name for name in ("pairs", "records", "questions") for _ in range(getattr(s, name))]
    tok = train_tokenizer(out)
    cfg = TextConfig(vocab_size=-(-len(tok) // 64) * 64, hidden_size=s.width, intermediate_size=s.width * 11 // 4,
                     num_hidden_layers=s.depth, num_attention_heads=heads, num_key_value_heads=heads, head_dim=32,
                     rms_norm_eps=1e-5, max_position_embeddings=2048)
    about = {k: getattr(cfg, k) for k in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings")}
    about |= dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", rope_scaling=None,
                  attention_bias=False, mlp_bias=False, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
                  pad_token_id=0, torch_dtype="float16")
    lm = Llama(cfg)
    init_weights(lm, s.seed)
    g = torch.Generator().manual_seed(s.seed)
    with torch.no_grad():
        lm.model.embed_tokens.weight.mul_(s.embed / 0.02)
        for layer in lm.model.layers:
            # init_weights filled these matrices with zeros. With random values, training is faster
            for p in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                p.copy_(torch.randn(p.shape, generator=g) * s.residual * p.shape[1] ** -0.5)
    print(f"LLM: {sum(p.numel() for p in lm.parameters()):,} parameters, {len(tok)} vocabulary entries", flush=True)

    def loss_of_step(step):
        rng, docs = random.Random(f"tongue/{s.seed}/{step}"), []        # keep this text: it seeded demo/llm
        while sum(len(d[0]) for d in docs) < s.tokens:
            docs.append(lessons.lesson_document(plan[step], tok, rng))
        b = pack(docs, 1)
        rows = (b.labels != IGNORE).nonzero()[:, 0]                                           # (R,)
        hidden = lm(lm.model.embed_tokens(b.ids).bfloat16(), b.pos, b.lo, b.hi, rows)         # (R, width)
        return linear_cross_entropy(hidden, lm.head_weight, b.labels[rows]) / len(rows)

    def score():
        return {"exam": {k: round(v, 3) for k, v in reading_score(lm, tok, s.exam).items()}}
    train(lm, s, out, len(plan), s.pairs + s.records, loss_of_step, score, about)


# ---- the vision tower -----------------------------------------------------------------------------------------------

VIT = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=toy.SIDE,
           patch_size=12)
# kinds of attributes of a cell: its content, and also its place, so that the features of a patch encode the place
CLASSES = {"color": [*toy.COLORS], "shape": toy.SHAPES, "size": toy.SIZES, "digit": [*range(10)],
           "row": [*range(3)], "column": [*range(3)]}
COUNTS = [len(v) + 1 for v in CLASSES.values()]            # + 1: class 0 means that the cell has no such attribute
PER_CELL = toy.SIDE // VIT["patch_size"] // 3              # patches along a cell's side
CELLS = torch.arange(9).view(3, 1, 3, 1).expand(3, PER_CELL, 3, PER_CELL).flatten()  # (T - 1,) cell of each patch


class Pretraining(torch.nn.Module):
    """A ViT with the head that trains it: from each patch, one linear layer predicts the attributes and the position of
    the patch's cell. The loss is computed for the last block and for the block before it, whose output LLaVA uses."""

    def __init__(self):
        super().__init__()
        D = VIT["hidden_size"]
        self.vision_model = VisionModel(VisionConfig(**VIT, feature_layer=VIT["num_hidden_layers"]))
        self.vision_model.post_layernorm = torch.nn.LayerNorm(D, eps=1e-5)
        self.classes = torch.nn.Linear(D, sum(COUNTS))
        self.vision_model.encoder.layers[-2].register_forward_hook(lambda m, i, o: setattr(self, "early", o))

    def forward(self, images, truth):
        """images (I, 3, S, S) uint8, truth (I, 9, K): the classes of the 9 cells of each image -> the loss, a scalar"""
        x = self.vision_model.post_layernorm(self.vision_model(images))                 # (I, T, D)
        early = self.vision_model.post_layernorm(self.early.view(x.shape))              # (I, T, D), block -2
        truth = truth[:, CELLS].repeat(2, 1, 1)                                         # (2 * I, T - 1, K)
        logits = self.classes(torch.cat([x, early])[:, 1:]).float()                     # (2 * I, T - 1, sum of COUNTS)
        return sum(F.cross_entropy(z.flatten(0, 1), truth[:, :, i].flatten())
                   for i, z in enumerate(logits.split(COUNTS, dim=-1)))


def change_one(scene, rng):
    """-> a copy of the scene, in which one object has another colour, shape, size or place"""
    while True:
        new = json.loads(json.dumps(scene))
        o, change = rng.choice(new["objects"]), rng.choice(["color", "shape", "size", "place"])
        if change == "place":
            taken = {(x["row"], x["column"]) for x in toy.things(scene)}
            free = [(r, k) for r in range(3) for k in range(3) if (r, k) not in taken]
            o["row"], o["column"] = rng.choice(free)
        else:
            o[change] = rng.choice(CLASSES[change])
        new["objects"].sort(key=lambda x: (x["row"], x["column"]))
        pairs = {toy.pair_name(x) for x in new["objects"]}
        if new != scene and len(pairs) == len(new["objects"]) and not any(toy.held_out(**x) for x in new["objects"]):
            return new


def make_examples(n, seed, test=False):
    """Draw n scenes -> images (n, 3, S, S) uint8, classes (n, 9, K). For training, every second scene is a copy of the
    scene before it, with one attribute changed."""
    images, classes = [], torch.zeros(n, 9, len(CLASSES), dtype=torch.long)
    scene = None
    for i in range(n):
        rng = random.Random(f"sight/{seed}/{i}")
        scene = toy.make_scene(rng, test, 0.4 if test else 0.8) if i % 2 == 0 or test else change_one(scene, rng)
        images.append(torch.from_numpy(np.array(toy.draw_scene(scene, rng.getrandbits(32)))).permute(2, 0, 1))
        for o in toy.things(scene):
            for k, name in enumerate(CLASSES):
                if name in o:
                    classes[i, 3 * o["row"] + o["column"], k] = 1 + CLASSES[name].index(o[name])
    return torch.stack(images), classes


@torch.no_grad()
def probe(model, train, test, layer):
    """Train a linear probe on a block of the frozen ViT -> {kind of attribute: accuracy}.

    The probe is a ridge regression: it predicts the classes of a cell from the concatenated features of its patches.
    The accuracy is measured on the held-out scenes, over the cells that have such an attribute.

    train, test    (images, classes), as from make_examples
    layer          which block: -2 is the last but one"""
    def features(images):
        out = []
        for part in images.split(500):
            outputs = []
            hook = model.vision_model.encoder.layers[layer].register_forward_hook(lambda m, i, o: outputs.append(o))
            model.vision_model(part)
            hook.remove()
            f = outputs[0].view(len(part), -1, VIT["hidden_size"])[:, 1:].unflatten(1, (3, PER_CELL, 3, PER_CELL))
            out.append(f.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(0, 2))             # (9 * I, PER_CELL^2 * D)
        f = torch.cat(out).double()
        return torch.cat([f, torch.ones(len(f), 1, dtype=torch.float64)], 1)

    a, b = features(train[0]), features(test[0])
    gram = a.T @ a + 1e-5 * len(a) * torch.eye(a.shape[1], dtype=torch.float64)
    score = {}
    for k, (name, values) in enumerate(CLASSES.items()):
        y = F.one_hot(train[1][:, :, k].flatten(), len(values) + 1).double()
        guess, truth = (b @ torch.linalg.solve(gram, a.T @ y)).argmax(1), test[1][:, :, k].flatten()
        score[name] = round((guess == truth)[truth > 0].double().mean().item(), 3)
    return score


def train_vit(s):
    out, model = make_folder(s), Pretraining()
    init_weights(model, s.seed)
    images, classes = make_examples(s.scenes, s.seed)
    probed, test = tuple(x[:3000] for x in (images, classes)), make_examples(s.exam, "exam", test=True)
    n = sum(p.numel() for p in model.vision_model.parameters())
    print(f"ViT: {n:,} parameters", flush=True)
    (out / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": toy.SIDE},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": toy.SIDE, "width": toy.SIDE}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(VisionConfig().image_mean),
        "image_std": list(VisionConfig().image_std), "do_convert_rgb": True}, indent=2))
    about = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **VIT, "num_channels": 3,
             "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": VIT["hidden_size"],
             "torch_dtype": "float16"}
    g = torch.Generator().manual_seed(s.seed)

    def loss_of_step(step):
        i = torch.randint(0, s.scenes // 2, (s.batch // 2,), generator=g) * 2
        i = torch.stack([i, i + 1], 1).flatten().tolist()                               # a scene and its changed copy
        pixels, truth = images[i], classes[i]
        grey = torch.rand(len(i), generator=g) < 1 / 3     # these become grey: shapes must be recognised without colour
        pixels[grey] = pixels[grey].float().mean(1, keepdim=True).to(torch.uint8).expand(-1, 3, -1, -1)
        truth[grey, :, 0] = IGNORE                                                      # no colour loss for grey images
        return model(pixels, truth)

    def score():
        return {"probe": {str(layer): probe(model, probed, test, layer) for layer in (-2, -1)}}  # LLaVA uses block -2
    train(model, s, out, s.steps, 0, loss_of_step, score, about, prefix="vision_model.")


def main(argv):
    which = argv[0] if argv else ""
    if which in ("-h", "--help"):
        return print(__doc__.strip())
    if which not in ("llm", "vit"):
        config.stop("which tower? python demo/pretrain.py llm|vit [--key=value ...]")
    settings, train = {"llm": (LLMSettings, train_llm), "vit": (ViTSettings, train_vit)}[which]
    train(parse(settings, argv[1:], __doc__))


if __name__ == "__main__":
    with config.one_line_errors():
        main(sys.argv[1:])

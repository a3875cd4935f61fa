"""The rows (cases) of `python -m bench step`: models of published shapes, conversations of realistic lengths, and the
FLOPs of a step. bench/step.py measures them.

Stage 1 trains the connector. Stage 2 also trains the LLM, either all of its weights (full) or LoRA adapters.

    step_align, step_sft    on a CPU, 4 conversations a step. A ViT of 6 layers of width 192, a Llama of 6 layers of
                            width 256 with a vocabulary of 32,000. align: stage 1; sft: stage 2, full
    toy_align, toy_sft      on a CPU, 32 conversations a step, the model of the toy world
    S1                      stage 1 of CLIP ViT-L/336 and Llama 7B
    S2, S3                  stage 2 of the same model. S2: LoRA of rank 128; S3: full
    S4                      stage 2, full, of CLIP ViT-L/336 and TinyLlama 1.1B
    S4b                     stage 2, full, of CLIP ViT-L/336 and Llama 3.2 1B, with its vocabulary of 128,256
    S5                      stage 2, full, of SigLIP-B/16-512 and SmolLM2 360M
"""

import dataclasses

import torch

import bench


@dataclasses.dataclass
class System:
    cfg: object                    # model.VLMConfig
    stage: str                     # "align": the connector trains; "sft": also the LLM; "lora": also LoRA adapters
    samples: int                   # conversations per step
    peers: tuple                   # programs that our training loop is compared with
    goals: dict = dataclasses.field(default_factory=dict)  # peer -> goal for: our speed / its speed
    # sigma of the lengths, which are log-normal with median 90; None: lengths as in LLaVA's data
    spread: float | None = None
    room: int = 1 << 30            # for our code: maximum tokens per packed sequence
    micro: int = 1 << 30           # for the peers: maximum conversations per batch
    r: int = 0                     # rank of the adapters


NAMES = {"cpu": ("step_align", "step_sft", "toy_align", "toy_sft"), "cuda": ("S1", "S2", "S4", "S4b", "S5", "S3")}


def system(name, size="full"):
    """Return the System of the row called `name`. size="tiny" gives it a model of a few thousand parameters, to check
    that the row runs."""
    from model import TextConfig, VisionConfig, VLMConfig

    def vision(D, F, L, H, side, patch, **more):
        return VisionConfig(hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H,
                            image_size=side, patch_size=patch, **more)

    def text(C, F, L, H, G, K, V, **more):
        return TextConfig(vocab_size=V, hidden_size=C, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H,
                          num_key_value_heads=G, head_dim=K, **more)
    clip = vision(1024, 4096, 24, 16, 336, 14)
    vicuna = VLMConfig(clip, text(4096, 11008, 32, 32, 32, 128, 32000), image_token_index=3)
    both = ("theirs", "theirs+liger")
    small = VLMConfig(vision(192, 768, 6, 3, 112, 14), text(256, 688, 6, 8, 4, 32, 32000), image_token_index=3)
    toy = VLMConfig(vision(128, 512, 4, 4, 72, 12), text(128, 352, 6, 4, 4, 32, 512), image_token_index=3)
    tinyllama = text(2048, 5632, 22, 32, 4, 64, 32000)
    llama32 = text(2048, 8192, 16, 32, 8, 64, 128256, tie_word_embeddings=True, rope_theta=500000.0)
    siglip = vision(768, 3072, 12, 12, 512, 16, model_type="siglip_vision_model", hidden_act="gelu_pytorch_tanh")
    smollm = text(960, 2560, 32, 15, 5, 64, 49152, tie_word_embeddings=True, rope_theta=100000.0)
    s = {
        "step_align": System(small, "align", 4, ("theirs",), {"theirs": 2.5}, 0.7),
        "step_sft": System(small, "sft", 4, ("theirs",), {"theirs": 2.3}, 0.7),
        "toy_align": System(toy, "align", 32, ("theirs",), {}, 0.25),
        "toy_sft": System(toy, "sft", 32, ("theirs",), {}, 0.25),
        "S1": System(vicuna, "align", 32, (*both, "theirs+ckpt"), {"theirs": 1.3, "theirs+liger": 1.1}, None, 20480,
                     16),
        "S2": System(vicuna, "lora", 24, both, {"theirs": 2.0, "theirs+liger": 1.7}, None, 12288, 8, r=128),
        "S3": System(vicuna, "sft", 24, both, {"theirs": 1.7, "theirs+liger": 1.5}, None, 8192, 2),
        "S4": System(VLMConfig(clip, tinyllama, image_token_index=3), "sft", 48, (*both, "theirs+sorted"),
                     {"theirs": 2.0, "theirs+liger": 1.7, "theirs+sorted": 1.1}, None, 16384, 16),
        "S4b": System(VLMConfig(clip, llama32, image_token_index=3), "sft", 48, (*both, "theirs+sorted"),
                      {"theirs": 2.0, "theirs+liger": 1.7, "theirs+sorted": 1.1}, None, 16384, 16),
        "S5": System(VLMConfig(siglip, smollm, image_token_index=3), "sft", 32, both, {"theirs": 2.0}, None, 16384, 8),
    }[name]
    if size == "full":
        return s
    v, t = s.cfg.vision, s.cfg.text
    g = t.num_attention_heads // t.num_key_value_heads
    v = dataclasses.replace(v, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                            image_size=2 * v.patch_size)
    t = dataclasses.replace(t, vocab_size=512, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                            num_attention_heads=g, num_key_value_heads=1, head_dim=8)
    return dataclasses.replace(s, cfg=dataclasses.replace(s.cfg, vision=v, text=t), samples=6, r=min(s.r, 4),
                               room=60 if s.stage == "align" else 1500, micro=min(s.micro, 4))


# ---- the inputs of both sides --------------------------------------------------------------------------------------

def conversations(s, step, mean=90, asked=10, answered=3):
    """Return the conversations of one step, as data.pack takes them: BOS, images, then text in turns. The last tokens
    of each turn are supervised.

    If s.spread is given (rows for a CPU), a turn has `asked` unsupervised and `answered` supervised tokens, and lengths
    are log-normal with median `mean`. So a padded batch has 1.3 to 1.75 times the tokens, as with real conversations.
    Rows for a GPU draw lengths from LLaVA's mixture. In stage align, they draw captions of about 18 tokens, all
    supervised."""
    g = torch.Generator().manual_seed(1000 + step)
    if s.spread is not None:
        lengths = (mean * (s.spread * torch.randn(s.samples, generator=g)).exp()).long().clamp(8, 5 * mean).tolist()
        plan = [(n, answered / (asked + answered), 1) for n in lengths]
    elif s.stage == "align":
        lengths = (18 * (0.3 * torch.randn(s.samples, generator=g)).exp()).long().clamp(4, 80).tolist()
        plan = [(n, 1.0, 1) for n in lengths]
    else:
        plan = bench.draw_lengths(s.samples, g)
    out, S = [], s.cfg.vision.image_size
    for n, share, n_images in plan:
        turn = asked + answered if s.spread is not None else 20
        supervised = max(1, round(turn * share))
        text = torch.randint(4, s.cfg.text.vocab_size, (n,), generator=g).tolist()
        ids = [1] + [s.cfg.image_token_index] * (s.cfg.vision.patches * n_images)
        labels = [-100] * len(ids) + [t if i % turn >= turn - supervised else -100 for i, t in enumerate(text)]
        out.append((ids + text, labels, torch.randint(0, 256, (n_images, 3, S, S), generator=g, dtype=torch.uint8)))
    return out


def pad(cfg, made):
    """Return a padded batch of the samples `made`, as models of transformers take it."""
    longest = max(len(ids) for ids, _, _ in made)

    def rows(lists, filler):
        return torch.tensor([[*r, *[filler] * (longest - len(r))] for r in lists])
    mean, std = (torch.tensor(t).view(1, 3, 1, 1) for t in (cfg.vision.image_mean, cfg.vision.image_std))
    images = torch.cat([images for *_, images in made])
    return {"input_ids": rows([ids for ids, _, _ in made], 0), "labels": rows([labels for _, labels, _ in made], -100),
            "attention_mask": rows([[1] * len(ids) for ids, _, _ in made], 0),
            **({"pixel_values": (images / 255 - mean) / std} if len(images) else {})}


def fill(cfg, model, device, names=lambda k: [k]):
    """Set the parameters that `model` shares with our VLM to random values, always the same. names(k) lists the names
    that parameter k of VLM may have in `model`. Return the names of the parameters of `model` that VLM does not
    have."""
    from model import VLM
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in VLM(cfg).state_dict().items()}
    has, g = dict(model.named_parameters()), torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for k, shape in shapes.items():
            p = has.pop(next(n for n in names(k) if n in has))
            assert p.shape == shape, f"{k} is {tuple(shape)} here and {tuple(p.shape)} there"
            value = torch.empty(shape, device=device).normal_(0, 0.02, generator=g)
            p.copy_(value.add_("norm" in k and k.endswith("weight")))
    return set(has)


# ---- FLOPs ---------------------------------------------------------------------------------------------------------

def work(s, made):
    """Return the FLOPs of a step: matrix products, attention forward, attention backward.

    For each token, each weight of the LLM costs 2 FLOPs in forward, 2 for the gradient of its input and, if it is
    trained, 2 for its own gradient. In the last layer, unlabelled tokens need only k and v. Attention counts the pairs
    that are not masked; its backward costs 5/2 of its forward. Padding and recomputation do not count."""
    v, t = s.cfg.vision, s.cfg.text
    N = sum(len(ids) for ids, _, _ in made)
    R = sum(i >= 0 for _, labels, _ in made for i in labels[1:])
    I = sum(len(images) for *_, images in made)
    pairs = sum(len(ids) * (len(ids) + 1) // 2 for ids, _, _ in made)
    C, F, L, A, kv = (t.hidden_size, t.intermediate_size, t.num_hidden_layers, t.num_attention_heads * t.head_dim,
                      t.num_key_value_heads * t.head_dim)
    layer, keys = 2 * C * A + 2 * C * kv + 3 * C * F, 2 * C * kv
    adapters = 7 * C + 2 * A + 2 * kv + 3 * F                                  # input + output width of 7 linear layers
    rows = (L - 1) * layer * N + keys * N + (layer - keys) * R + t.vocab_size * C * R
    T, D = v.patches + v.class_token, v.hidden_size
    tower = 2 * I * (v.depth * T * (4 * D * D + 2 * D * v.intermediate_size) + v.patches * 3 * v.patch_size**2 * D)
    connector = I * v.patches * (4 * D * C + 6 * C * C)
    products = (6 if s.stage == "sft" else 4) * rows + 6 * s.r * adapters * L * N + tower + connector
    seen = 4 * pairs * A * (L - 1 + R / N)
    return products, seen + 4 * I * v.depth * T * T * D, 2.5 * seen

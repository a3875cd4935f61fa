"""A vision-language model: a ViT turns pictures into patch features, a connector makes words of them, a Llama reads on.

Everything runs on one packed stream of tokens, without padding and without a batch dimension (kernels/attention.py),
and the state dict is that of the published llava-hf checkpoints. The model knows no tokenizer, no dataset and no rank;
LoRA, sharding, recomputation and compilation are applied to it from outside.

    N tokens of the stream   R rows that are asked for   C LLM width   H heads   G kv-heads   K head dim   V vocabulary
    I images   P patches each   T = P + class and register tokens   Q tokens each after the connector (Q = P)
    D ViT width   S side in pixels
"""

import functools
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.attention import attention
from kernels.cross_entropy import IGNORE, linear_cross_entropy
from kernels.linear import linears
from kernels.norm import layer_norm, rms_norm
from kernels.rope import rope_qk
from kernels.swiglu import swiglu

# ---- configs: the names are those of the published config.json ------------------------------------------------------

@dataclass
class VisionConfig:
    model_type: str = "clip_vision_model"    # clip_vision_model, siglip_vision_model, dinov2, dinov2_with_registers
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12              # as published; how many are built follows from feature_layer
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"           # quick_gelu, gelu, gelu_pytorch_tanh
    layer_norm_eps: float = 1e-5
    num_register_tokens: int = 0             # DINOv2 with registers: 4
    feature_layer: int = -2                  # index into [embeddings, block 1 ... L]: -2 is the output of block L - 1
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # pixels arrive as uint8 and are normalised here
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)

    @property
    def class_token(self):
        return self.model_type != "siglip_vision_model"

    @property
    def patches(self):
        return (self.image_size // self.patch_size) ** 2

    @property
    def depth(self):
        """Blocks that are built: those that the chosen feature layer needs."""
        L, layer = self.num_hidden_layers, self.feature_layer
        assert -L - 1 <= layer <= L, f"feature layer {layer} of a ViT of {L} blocks"
        return layer % (L + 1)


@dataclass
class TextConfig:
    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None         # None, or rope_type llama3 or linear with its numbers
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    qkv_bias: bool = False                   # Qwen2
    o_bias: bool = False                     # Llama's attention_bias switches on q, k, v and o
    mlp_bias: bool = False
    qk_norm: bool = False                    # Qwen3
    sliding_window: int | None = None        # Mistral 7B v0.1


@dataclass
class VLMConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    connector: str = "mlp"                   # mlp: linear, GELU (erf), linear; linear: one matrix (LLaVA v1)
    image_token_index: int = 32000


# ---- the eyes -------------------------------------------------------------------------------------------------------

def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}


class LayerNorm(nn.LayerNorm):
    def forward(self, x, add=None):
        """x (..., D) -> its norm; with add (..., D): x + add, the norm of that"""
        return layer_norm(x, self.weight, self.bias, self.eps, add)


class ViTAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(cfg.hidden_size, cfg.hidden_size))

    def forward(self, x, lo, hi):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))  # (I T, H, K)
        return self.out_proj(attention(q, k, v, lo, hi).flatten(1))


class ViTMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.act = ACTIVATIONS[cfg.hidden_act]
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class ViTBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layer_norm1 = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.self_attn = ViTAttention(cfg)
        self.layer_norm2 = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.mlp = ViTMLP(cfg)
        scaled = cfg.model_type.startswith("dinov2")  # DINOv2 multiplies each branch by a learnt vector
        self.layer_scale1 = nn.Parameter(torch.ones(cfg.hidden_size)) if scaled else None
        self.layer_scale2 = nn.Parameter(torch.ones(cfg.hidden_size)) if scaled else None

    def forward(self, x, lo, hi):
        h = self.self_attn(self.layer_norm1(x), lo, hi)
        x, y = self.layer_norm2(x, h if self.layer_scale1 is None else h * self.layer_scale1)
        h = self.mlp(y)
        return x + (h if self.layer_scale2 is None else h * self.layer_scale2)


class ViTEmbeddings(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, D, p, registers = cfg, cfg.hidden_size, cfg.patch_size, cfg.num_register_tokens
        self.class_embedding = nn.Parameter(torch.empty(D)) if cfg.class_token else None
        self.register_tokens = nn.Parameter(torch.empty(registers, D)) if registers else None
        self.patch_embedding = nn.Conv2d(3, D, p, p, bias=cfg.model_type != "clip_vision_model")
        self.position_embedding = nn.Embedding(cfg.patches + cfg.class_token, D)

    def forward(self, images):
        cfg, p, conv = self.cfg, self.cfg.patch_size, self.patch_embedding
        side = cfg.image_size // p * p  # a last, incomplete patch is dropped, as a convolution without padding would
        x = images[:, :, :side, :side].to(torch.float32) / 255
        mean, std = (torch.tensor(t, device=x.device).view(1, 3, 1, 1) for t in (cfg.image_mean, cfg.image_std))
        x = ((x - mean) / std).to(conv.weight.dtype)
        x = x.unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 2, 4, 1, 3, 5)        # (I, rows, columns, 3, p, p)
        x = F.linear(x.reshape(x.shape[0], cfg.patches, 3 * p * p), conv.weight.flatten(1), conv.bias)       # (I, P, D)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)            # (I, T, D)
        x = x + self.position_embedding.weight.to(x.dtype)
        if self.register_tokens is not None:  # after the positions were added
            x = torch.cat([x[:, :1], self.register_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        return x


class VisionModel(nn.Module):
    """images (I, 3, S, S) uint8 -> all tokens of the feature layer (I, T, D), before any final norm; I may be 0."""

    def __init__(self, cfg):
        super().__init__()
        clip = cfg.model_type == "clip_vision_model"
        self.embeddings = ViTEmbeddings(cfg)
        self.pre_layrnorm = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps) if clip else None  # a published typo
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.depth))

    def forward(self, images):
        x = self.embeddings(images)
        I, T, D = x.shape
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        lo = torch.arange(0, I * T, T, dtype=torch.int32, device=x.device).repeat_interleave(T)
        hi = lo + T                                                                        # a patch sees its own image
        x = x.reshape(I * T, D)
        for block in self.encoder.layers:
            x = block(x, lo, hi)
        return x.view(I, T, D)


class VisionTower(nn.Module):
    """images (I, 3, S, S) uint8 -> patch features (I, P, D): class and register tokens stay behind."""

    def __init__(self, cfg):
        super().__init__()
        self.skip = cfg.class_token + cfg.num_register_tokens
        self.vision_model = VisionModel(cfg)

    def forward(self, images):
        return self.vision_model(images)[:, self.skip :]


# ---- from features to words -----------------------------------------------------------------------------------------

class Connector(nn.Module):
    """(I, P, D) -> (I, Q, C), Q = P."""

    def __init__(self, kind, D, C):
        super().__init__()
        assert kind in ("linear", "mlp"), f"connector {kind!r}: linear or mlp"
        self.linear_1 = nn.Linear(D, C)
        self.linear_2 = nn.Linear(C, C) if kind == "mlp" else None

    def forward(self, x):
        x = self.linear_1(x)
        return x if self.linear_2 is None else self.linear_2(F.gelu(x))


# ---- the reader -----------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps
        self.make = functools.partial(rms_norm, eps=eps)   # once: made anew, dynamo would take eps for an input

    def forward(self, x, add=None):
        """x (..., C) -> its norm; with add (..., C): x + add, the norm of that"""
        return rms_norm(x, self.weight, self.eps, add)

    def made(self, x):
        """How the norm of x is made, for together()."""
        return self.make, (x, self.weight)


def rope_frequencies(cfg, device=None):
    """(K/2,) fp32 angles per position. Recomputed where needed: a cast of the model to bf16 would round a buffer."""
    i = torch.arange(0, cfg.head_dim, 2, dtype=torch.int64, device=device).float()
    f = 1.0 / cfg.rope_theta ** (i / cfg.head_dim)
    s = cfg.rope_scaling or {}
    kind = s.get("rope_type", s.get("type", "default"))
    if kind == "linear":
        f = f / s["factor"]
    elif kind == "llama3":  # long waves are slowed down, short ones kept, those between blended
        old = s["original_max_position_embeddings"]
        wave = 2 * torch.pi / f
        blend = (old / wave - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        f = torch.where(wave > old / s["low_freq_factor"], f / s["factor"],
                        torch.where(wave < old / s["high_freq_factor"], f, (1 - blend) * f / s["factor"] + blend * f))
    elif kind != "default":
        raise ValueError(f"rope scaling {kind!r} is not known here: default, linear or llama3")
    return f


def together(x, *layers, made=None):
    """x (N, C) -> [layer(x)] of the linear layers that read the same x. Where one of them brings a way to do that at
    once (the adapters of lora.py, which are put in from outside), it is taken. made: (make, sources) with which x is
    make(*sources); where all layers learn, these are kept for the backward pass, and not x."""
    way = next((f.together for f in layers if hasattr(f, "together")), None)
    if way is not None:
        return way(x, layers, made)
    if made and torch.is_grad_enabled() and all(type(f) is nn.Linear and f.weight.requires_grad for f in layers):
        return linears(x, *made, layers)
    return [f(x) for f in layers]


class LlamaAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        H, G, K, C = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.hidden_size
        self.K = K
        self.q_proj = nn.Linear(C, H * K, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(C, G * K, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(C, G * K, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(H * K, C, bias=cfg.o_bias)
        self.q_norm, self.k_norm = (RMSNorm(K, cfg.rms_norm_eps) if cfg.qk_norm else None for _ in range(2))

    def forward(self, x, cos, sin, lo, hi, rows=None, cache=None, made=None):
        """x (N, C) -> (N, C), or (R, C) if only `rows` are asked for: then only those make a query. made: how x was."""
        if rows is None:
            q, k, v = together(x, self.q_proj, self.k_proj, self.v_proj, made=made)
        else:
            q, (k, v) = self.q_proj(x[rows]), together(x, self.k_proj, self.v_proj, made=made)
        q, k, v = (t.unflatten(-1, (-1, self.K)) for t in (q, k, v))       # (R, H, K), (N, G, K), (N, G, K)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope_qk(q, k, cos, sin, rows)
        if rows is not None:
            lo, hi = lo[rows], hi[rows]
        if cache is not None:
            k, v = cache.append(self, k, v)                                # (M, G, K)
        return self.o_proj(attention(q, k, v, lo, hi).flatten(1))


class LlamaMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.mlp_bias)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=cfg.mlp_bias)

    def forward(self, x, made=None):
        gate, up = together(x, self.gate_proj, self.up_proj, made=made)
        return together(swiglu(gate, up), self.down_proj, made=(swiglu, (gate, up)))[0]


class LlamaLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.self_attn = LlamaAttention(cfg)
        self.mlp = LlamaMLP(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, x, cos, sin, lo, hi, rows=None, cache=None):
        """Kept for the backward pass, where all is trained: x, q, k, v, what attention gave, the second x, gate, up."""
        h = self.self_attn(self.input_layernorm(x), cos, sin, lo, hi, rows, cache, self.input_layernorm.made(x))
        x, y = self.post_attention_layernorm(x if rows is None else x[rows], h)
        return x + self.mlp(y, self.post_attention_layernorm.made(x))


class Llama(nn.Module):
    """x (N, C) embedded tokens -> hidden states after the last norm: (N, C), or (R, C) for `rows`."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.model.layers = nn.ModuleList(LlamaLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.model.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = None if cfg.tie_word_embeddings else nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    @property
    def head_weight(self):
        """(V, C): the head is a matrix and not a call, for logits are made chunk by chunk inside the loss."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def forward(self, x, pos, lo, hi, rows=None, cache=None):
        angles = pos[:, None].float() * rope_frequencies(self.cfg, x.device)   # (N, K/2), fp32: bf16 takes 257 for 256
        cos, sin = angles.cos(), angles.sin()
        if self.cfg.sliding_window:
            lo = torch.maximum(lo, hi - self.cfg.sliding_window)
        for layer in self.model.layers[:-1]:
            x = layer(x, cos, sin, lo, hi, cache=cache)
        x = self.model.layers[-1](x, cos, sin, lo, hi, rows, cache)           # all the others only give keys and values
        return self.model.norm(x)


def logits_head(hidden, weight, labels):
    """(R, C), (V, C) -> logits (R, V), for use as `head` below."""
    return hidden @ weight.to(hidden.dtype).T


class VLM(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vision_tower = VisionTower(cfg.vision)
        self.multi_modal_projector = Connector(cfg.connector, cfg.vision.hidden_size, cfg.text.hidden_size)
        self.language_model = Llama(cfg.text)

    def train(self, mode=True):
        """What is frozen as a whole stays in eval mode, whatever is asked for: it is used, not trained."""
        super().train(mode)
        for part in self.children():
            part.train(mode and any(p.requires_grad for p in part.parameters()))
        return self

    def see(self, images):
        """(I, 3, S, S) uint8 -> (I, Q, C). A frozen tower builds no graph."""
        learns = any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            features = self.vision_tower(images)
        return self.multi_modal_projector(features)

    def forward(self, ids, labels, pos, lo, hi, images, head=linear_cross_entropy, cache=None):
        """One packed stream: ids, labels, pos, lo, hi (N,), images (I, 3, S, S) uint8. Only rows with a label go
        through the last layer; `head(hidden (R, C), weight (V, C), labels (R,))` turns them into what is returned: the
        summed loss by default."""
        rows = (labels != IGNORE).nonzero()[:, 0]        # (R,), first of all: for their number, alone, the host waits
        x = self.language_model.model.embed_tokens(ids)                        # (N, C)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))                  # fp32 embeddings would widen the stream
        z = self.see(images).flatten(0, 1)                                     # (I Q, C)
        # as many holes as features, and a -1 that says that there are no more: the device checks, the host goes on
        holes = (ids == self.cfg.image_token_index).nonzero_static(size=len(z) + 1)[:, 0]              # (I Q + 1,)
        torch._assert_async(holes[-1] < 0, "there are more places for pictures than pictures")
        torch._assert_async((holes[:-1] >= 0).all(), "there are more pictures than places for them")
        x = x.index_copy(0, holes[:-1], z.to(x.dtype))   # masked_scatter's gradient would list its numbers one by one
        hidden = self.language_model(x, pos, lo, hi, rows, cache)
        return head(hidden, self.language_model.head_weight, labels[rows])


@torch.no_grad()
def init_weights(model, seed=0):
    """Fill every parameter, in the order of the names, from one seed:

        norms                weight 1, bias 0       class, register and position tokens    N(0, 0.02)
        matrices             N(0, 1/sqrt(fan in))   o_proj, out_proj, down_proj, fc2       0: a block starts as identity
        connector            as torch.nn.Linear     DINOv2's layer scale                   1
        token embeddings     N(0, 0.02)             other biases                           0
    """
    g = torch.Generator().manual_seed(seed)
    params = dict(sorted(model.named_parameters()))
    for name, p in params.items():
        if "linear_" in name:  # the connector's, whether the whole model was given or the connector alone
            fan_in = params[name.replace("bias", "weight")].shape[1]
            value = (2 * torch.rand(p.shape, generator=g) - 1) * fan_in**-0.5
        elif "norm" in name or "layer_scale" in name:
            value = torch.zeros(p.shape) if name.endswith("bias") else torch.ones(p.shape)
        elif name.endswith("bias") or any(s in name for s in ("o_proj", "out_proj", "down_proj", "fc2")):
            value = torch.zeros(p.shape)
        elif "embed" in name and "patch" not in name or "register_tokens" in name:
            value = torch.randn(p.shape, generator=g) * 0.02
        else:  # the usual 0.02 is 1/sqrt(fan in) at width 2,500, and far too small at the toy's 128
            value = torch.randn(p.shape, generator=g) * p[0].numel() ** -0.5
        p.copy_(value)


# ---- talking --------------------------------------------------------------------------------------------------------



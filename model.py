"""A vision-language model: a vision transformer turns images into patch features, a connector maps these to token
embeddings of a Llama decoder, and the decoder processes them with the text.

All tokens are in one packed sequence (stream), without padding and without a batch dimension. Token n attends
to the tokens [lo[n], hi[n]) (kernels/attention.py). The state dict has the names of the published llava-hf checkpoints.
The model does not depend on tokenizer, data set or rank. Other files add LoRA, sharding, recomputation, compilation.

    N tokens of the stream   R tokens with a label   C LLM width   H heads   G key-value heads   K head width
    I images   P patches per image   T = P + class and register tokens   Q tokens per image after the connector (= P)
    V vocabulary size   D ViT width   S image side in pixels
"""

from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.attention import attention
from kernels.cross_entropy import IGNORE, linear_cross_entropy
from kernels.norm import layer_norm, rms_norm
from kernels.rope import rope_qk
from kernels.swiglu import swiglu

# ---- configs, with the names of the published config.json -----------------------------------------------------------

@dataclass
class VisionConfig:
    model_type: str = "clip_vision_model"    # clip_vision_model, siglip_vision_model, dinov2, dinov2_with_registers
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12              # as in config.json; only the first `depth` blocks are built
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"           # quick_gelu, gelu, gelu_pytorch_tanh
    layer_norm_eps: float = 1e-5
    num_register_tokens: int = 0             # DINOv2 with registers: 4
    feature_layer: int | tuple = -2          # index into outputs [embeddings, block 1, ..., block L]; -2: block L - 1
    feature_norm: bool = False               # parts/features.py: the ViT's final norm is applied (PaliGemma)
    keep_class: bool = False                 # parts/features.py: the class token is a feature, too (BLIP-2)
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # per colour channel; ViTEmbeddings normalises with them
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)

    @property
    def class_token(self):
        return self.model_type != "siglip_vision_model"

    @property
    def patches(self):
        return (self.image_size // self.patch_size) ** 2

    @property
    def depth(self):
        """Number of blocks up to the last feature layer; later blocks are not built"""
        L, layers = self.num_hidden_layers, self.feature_layer
        layers = layers if isinstance(layers, tuple) else (layers,)
        assert all(-L - 1 <= layer <= L for layer in layers), f"feature layers {layers} of a ViT of {L} blocks"
        return max(layer % (L + 1) for layer in layers)


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
    rope_scaling: dict | None = None         # None, or a dict with rope_type: llama3 or linear
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    first_position: int = 0                  # PaliGemma counts the positions of a document from 1
    qkv_bias: bool = False                   # True in Qwen2
    o_bias: bool = False                     # attention_bias in config.json sets qkv_bias and o_bias
    mlp_bias: bool = False
    qk_norm: bool = False                    # True in Qwen3
    sliding_window: int | None = None        # a token attends to at most this many keys (Mistral 7B v0.1: 4096)


@dataclass
class VLMConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    connector: str = "mlp"                   # "linear" or "mlp"; parts/ has others
    image_token_index: int = 32000
    tokens: int = 0                          # tokens of one image after the connector; 0 = one per patch
    connector_args: dict = field(default_factory=dict)   # further settings of a connector of parts/
    mask: str = "causal"                     # attention mask; parts/spans.py has others
    layout: dict = field(default_factory=dict)           # how images become tokens: parts/tiles.py; {}: images.Layout
    second: VisionConfig | None = None       # a second vision tower, as in COMM (parts/features.py)

    @property
    def image_tokens(self):
        return self.tokens or self.vision.patches


# ---- vision transformer ---------------------------------------------------------------------------------------------

def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x, h):
        """-> x + h, and LayerNorm of x + h. On a GPU, one kernel computes the two results."""
        return layer_norm(x, self.weight, self.bias, self.eps, h)


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
        scaled = cfg.model_type.startswith("dinov2")  # DINOv2 scales each residual branch by a trained vector
        self.layer_scale1 = nn.Parameter(torch.ones(cfg.hidden_size)) if scaled else None
        self.layer_scale2 = nn.Parameter(torch.ones(cfg.hidden_size)) if scaled else None

    def forward(self, x, lo, hi):
        def scaled(branch, scale):
            return branch if scale is None else branch * scale

        h = scaled(self.self_attn(self.layer_norm1(x), lo, hi), self.layer_scale1)
        x, y = self.layer_norm2.add(x, h)
        return x + scaled(self.mlp(y), self.layer_scale2)


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
        side = cfg.image_size // p * p  # drop an incomplete patch at the edge, as a convolution without padding does
        x = images[:, :, :side, :side].to(torch.float32) / 255
        x = torch.stack([(c - m) / s for c, m, s in zip(x.unbind(1), cfg.image_mean, cfg.image_std)], 1)  # (I, 3, S, S)
        x = x.to(conv.weight.dtype)             # m and s are numbers: tensors would need a host-device sync
        x = x.unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 2, 4, 1, 3, 5)        # (I, rows, columns, 3, p, p)
        x = F.linear(x.reshape(x.shape[0], cfg.patches, 3 * p * p), conv.weight.flatten(1), conv.bias)       # (I, P, D)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)        # (I, 1 + P, D)
        x = x + self.position_embedding.weight.to(x.dtype)
        if self.register_tokens is not None:  # register tokens have no position embedding
            x = torch.cat([x[:, :1], self.register_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        return x


class VisionModel(nn.Module):
    """images (I, 3, S, S) uint8 -> output of the feature layer for all tokens (I, T, D), no final norm. I may be 0."""

    def __init__(self, cfg):
        super().__init__()
        clip = cfg.model_type == "clip_vision_model"
        self.embeddings = ViTEmbeddings(cfg)
        self.pre_layrnorm = LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps) if clip else None  # CLIP's own spelling
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.depth))

    def tokens(self, images):
        """-> x (I, T, D) before the first block, and the key ranges lo, hi (I T,) of the tokens"""
        x = self.embeddings(images)
        I, T, _ = x.shape
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        lo = torch.arange(0, I * T, T, dtype=torch.int32, device=x.device).repeat_interleave(T)            # (I T,)
        return x, lo, lo + T                                              # a token attends only to its own image

    def forward(self, images):
        x, lo, hi = self.tokens(images)
        shape, x = x.shape, x.flatten(0, 1)                                                                # (I T, D)
        for block in self.encoder.layers:
            x = block(x, lo, hi)
        return x.view(shape)


class VisionTower(nn.Module):
    """images (I, 3, S, S) uint8 -> patch features (I, P, D), without class and register tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.skip = cfg.class_token + cfg.num_register_tokens
        self.vision_model = VisionModel(cfg)

    @property
    def blocks(self):
        return self.vision_model.encoder.layers

    def forward(self, images):
        return self.vision_model(images)[:, self.skip :]


# ---- connector: (I, P, D) -> (I, Q, C) ------------------------------------------------------------------------------

class LinearConnector(nn.Module):
    """The connector of LLaVA v1: one linear layer."""

    def __init__(self, D, C):
        super().__init__()
        self.linear_1 = nn.Linear(D, C)

    def forward(self, x):
        return self.linear_1(x)


class MLPConnector(nn.Module):
    """The connector of LLaVA-1.5: linear, GELU, linear."""

    def __init__(self, D, C):
        super().__init__()
        self.linear_1 = nn.Linear(D, C)
        self.linear_2 = nn.Linear(C, C)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x)))


CONNECTORS = {"linear": LinearConnector, "mlp": MLPConnector}


# ---- decoder --------------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)

    def add(self, x, h):
        """-> x + h, and RMSNorm of x + h. On a GPU, one kernel computes the two results."""
        return rms_norm(x, self.weight, self.eps, h)


def rope_frequencies(cfg, device=None):
    """-> (K/2,) rotation angles for one step of position, fp32. Not kept in a buffer: model.to(bf16) would round it."""
    i = torch.arange(0, cfg.head_dim, 2, dtype=torch.int64, device=device).float()
    f = 1.0 / cfg.rope_theta ** (i / cfg.head_dim)
    s = cfg.rope_scaling or {}
    kind = s.get("rope_type", s.get("type", "default"))
    if kind == "linear":
        f = f / s["factor"]
    elif kind == "llama3":  # low frequencies are divided by `factor`, high ones stay, those between are interpolated
        old = s["original_max_position_embeddings"]
        wave = 2 * torch.pi / f
        blend = (old / wave - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        f = torch.where(wave > old / s["low_freq_factor"], f / s["factor"],
                        torch.where(wave < old / s["high_freq_factor"], f, (1 - blend) * f / s["factor"] + blend * f))
    elif kind != "default":
        raise ValueError(f"rope scaling {kind!r} is not supported: default, linear or llama3")
    return f


def take(x, rows):
    """x (N, ...) -> x (N, ...) if rows is None, else x[rows] (R, ...)"""
    return x if rows is None else x[rows]


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

    def qkv(self, x, rows=None):
        """-> queries, keys, values. With adapters, lora.py replaces this method."""
        return self.q_proj(take(x, rows)), self.k_proj(x), self.v_proj(x)

    def forward(self, x, cos, sin, lo, hi, rows=None, cache=None):
        """x (N, C) -> (N, C). If rows (R,) is given, only the tokens at `rows` are queries -> (R, C)."""
        q, k, v = (t.unflatten(-1, (-1, self.K)) for t in self.qkv(x, rows))   # (N or R, H, K), (N, G, K), (N, G, K)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope_qk(q, k, cos, sin, rows)
        if cache is not None:
            k, v = cache.append(self, k, v)                                   # k, v of the whole cache (generate.Cache)
        return self.o_proj(attention(q, k, v, take(lo, rows), take(hi, rows)).flatten(1))


class LlamaMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.mlp_bias)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=cfg.mlp_bias)

    def gate_up(self, x):
        """-> gate, up. With adapters, lora.py replaces this method."""
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x):
        return self.down_proj(swiglu(*self.gate_up(x)))


class LlamaLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.self_attn = LlamaAttention(cfg)
        self.mlp = LlamaMLP(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, x, cos, sin, lo, hi, rows=None, cache=None):
        """x (N, C) -> (N, C). If rows (R,) is given, only the tokens at `rows` pass the MLP -> (R, C)."""
        h = self.self_attn(self.input_layernorm(x), cos, sin, lo, hi, rows, cache)
        x, y = self.post_attention_layernorm.add(take(x, rows), h)
        return x + self.mlp(y)


class Llama(nn.Module):
    """x (N, C) token embeddings -> hidden states after the last norm (N, C), or (R, C) for the tokens `rows`"""

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
        """-> weight of the output head (V, C). The loss uses it in chunks and never calls the layer lm_head."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    @property
    def blocks(self):
        return self.model.layers

    def embed(self, ids):
        return self.model.embed_tokens(ids)

    def forward(self, x, pos, lo, hi, rows=None, cache=None):
        angles = (pos[:, None] + self.cfg.first_position).float() * rope_frequencies(self.cfg, x.device)     # (N, K/2)
        cos, sin = angles.cos(), angles.sin()
        if self.cfg.sliding_window:
            lo = torch.maximum(lo, hi - self.cfg.sliding_window)
        for layer in self.model.layers[:-1]:
            x = layer(x, cos, sin, lo, hi, cache=cache)
        x = self.model.layers[-1](x, cos, sin, lo, hi, rows, cache)  # tokens outside `rows` only add keys and values
        return self.model.norm(x)


# ---- vision-language model ------------------------------------------------------------------------------------------

def logits_head(hidden, weight, labels, weights=None):
    """hidden (R, C), weight (V, C) -> logits (R, V). With this `head`, VLM.forward returns logits, not the loss."""
    return hidden @ weight.to(hidden.dtype).T


class VLM(nn.Module):
    """LLaVA. For other systems, parts.build.build() passes another tower, connector or decoder."""

    def __init__(self, cfg, tower=None, connector=None, decoder=None):
        super().__init__()
        self.cfg = cfg
        self.vision_tower = tower or VisionTower(cfg.vision)
        self.multi_modal_projector = connector or CONNECTORS[cfg.connector](cfg.vision.hidden_size,
                                                                            cfg.text.hidden_size)
        self.language_model = decoder or Llama(cfg.text)

    @property
    def blocks(self):
        """The transformer blocks. engine.parallelize recomputes, compiles and shards each block separately."""
        return [*self.vision_tower.blocks, *self.language_model.blocks]

    def train(self, mode=True):
        """A part without trained parameters stays in eval mode."""
        super().train(mode)
        for part in self.children():
            part.train(mode and any(p.requires_grad for p in part.parameters()))
        return self

    def image_features(self, images):
        """images (I, 3, S, S) uint8 -> image features (I, Q, C). A frozen vision tower builds no autograd graph."""
        trained = any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            features = self.vision_tower(images)                               # (I, P, D)
        return self.multi_modal_projector(features)

    def forward(self, ids, labels, pos, lo, hi, images, weights=None, rows=(), head=linear_cross_entropy, cache=None):
        """One packed sequence: token ids, labels, positions, key ranges [lo, hi), all (N,); images (I, 3, S, S) uint8.

        In the last layer, only the R labelled tokens, at `rows`, are queries. -> head(hidden (R, C), weight (V, C),
        labels (R,), weights (R,)): by default the loss, summed over these tokens, each times its weight."""
        rows = rows if len(rows) else (labels != IGNORE).nonzero()[:, 0]       # (R,). nonzero() waits for a GPU
        x, *seen = self.inputs(ids, pos, images, cache)                        # (N, C)
        hidden = self.language_model(x, pos, lo, hi, rows, cache, *seen)       # (R, C)
        return head(hidden, self.language_model.head_weight, labels[rows], weights)

    def inputs(self, ids, pos, images, cache=None):
        """-> [x (N, C)]: token embeddings, with image features at the placeholders. A subclass may return more
        values: the decoder gets them as further arguments."""
        x = self.language_model.embed(ids)                                     # (N, C)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))                  # autocast does not cast embeddings
        z = self.image_features(images).flatten(0, 1)                          # (I Q, C)
        # at: indices of the image placeholders, then -1 in unused places. The two asserts need no host-device sync
        at = (ids == self.cfg.image_token_index).nonzero_static(size=len(z) + 1)[:, 0]                 # (I Q + 1,)
        torch._assert_async(at[-1] < 0, "there are more image placeholders than image features")
        torch._assert_async((at[:-1] >= 0).all(), "there are more image features than image placeholders")
        return [x.index_copy(0, at[:-1], z.to(x.dtype))]  # not masked_scatter, whose backward waits for the GPU

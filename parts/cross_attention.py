"""Gated cross-attention: the language model looks at images from new blocks between its layers (Flamingo).

Source: arXiv 2204.14198, section 2.2 and figure 4. An image is one marker token in the sequence. Before every n-th
layer of the language model, a new block adds what the tokens read from the image features z:

    x = x + tanh(a) attention(norm(x), z)        x = x + tanh(b) MLP(norm(x))

The gates a and b start at 0, so that the model starts as the language model, bit for bit. A token sees only the last
image up to and with itself, in its own document; without such an image, attention gives 0. Two forms of the block:

    flamingo    the paper's: LayerNorm; MLP: relu(x A)^2 B, four times as wide as x
    idefics     of Idefics (transformers: IdeficsForVisionText2Text): RMSNorm; SwiGLU, as wide as in the language model

    N tokens   I images   Q latents per image   D width of a latent   C width of the language model   H heads
    K head width   B conversations in the cache
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import stop
from kernels.attention import attention
from model import VLM, LayerNorm, Llama, LlamaMLP, RMSNorm, TextConfig, rope_frequencies
from parts.perceiver import Perceiver


@dataclass
class FlamingoConfig(TextConfig):
    model_type: str = "flamingo"
    cross_every: int = 1                     # a gated block stands before layers 0, n, 2 n, ...
    cross_width: int = 1024                  # D
    cross_qk_norm: bool = False              # RMSNorm of queries and keys of the gated blocks
    gate_width: int = 1                      # 1; C: one gate per channel; 0: no gates


@dataclass
class IdeficsConfig(FlamingoConfig):
    model_type: str = "idefics"
    base_vocab: int = 32000                  # the first table of a published folder; the second has the other rows


def last_image(marker, pos, Q):
    """-> lo, hi (N,): the latents of the last image that each token may see. marker (N,) bool: is it an image token?

    c: images up to and with the token; b: images before its document. lo = Q max(c - 1, b), hi = Q c"""
    c = marker.long().cumsum(0)
    b = torch.where(pos == 0, c - marker.long(), 0).cummax(0).values
    return (Q * torch.maximum(c - 1, b)).int(), (Q * c).int()


class ImageAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        H, K, C, D = cfg.num_attention_heads, cfg.head_dim, cfg.hidden_size, cfg.cross_width
        self.K = K
        self.q_proj = nn.Linear(C, H * K, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(D, H * K, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(H * K, C, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(K, cfg.rms_norm_eps) if cfg.cross_qk_norm else None for _ in range(2))

    def forward(self, x, z, lo, hi, cache=None):
        """x (N, C), z (I Q, D) -> (N, C)"""
        q, k, v = (t.unflatten(-1, (-1, self.K)) for t in (self.q_proj(x), self.k_proj(z), self.v_proj(z)))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:                # the first call has all images of the prompts, later calls have none
            k, v = cache.fixed.setdefault(self, (k, v))
        return self.o_proj(attention(q, k, v, lo, hi).flatten(1))


class SquaredReLU(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.up_proj = nn.Linear(C, 4 * C, bias=False)
        self.down_proj = nn.Linear(4 * C, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)).square())


class GatedBlock(nn.Module):
    """The block of the paper"""

    def __init__(self, cfg):
        super().__init__()
        self.cross_attn = ImageAttention(cfg)
        self.input_layernorm, self.mlp, self.post_attention_layernorm = self.parts(cfg)
        self.alpha_cross_attn, self.alpha_dense = (
            nn.Parameter(torch.zeros(cfg.gate_width)) if cfg.gate_width else None for _ in range(2))

    def reset_parameters(self):
        """For parts.init.init_new: the gates begin at 0."""
        for gate in self._parameters.values():
            if gate is not None:
                nn.init.zeros_(gate)

    def parts(self, cfg):
        return LayerNorm(cfg.hidden_size), SquaredReLU(cfg.hidden_size), LayerNorm(cfg.hidden_size)

    def forward(self, x, z, lo, hi, cache=None):
        """x (N, C), z (I Q, D) -> (N, C)"""
        def gated(h, alpha):
            return h if alpha is None else alpha.tanh().to(h.dtype) * h

        x = x + gated(self.cross_attn(self.input_layernorm(x), z, lo, hi, cache), self.alpha_cross_attn)
        return x + gated(self.mlp(self.post_attention_layernorm(x)), self.alpha_dense)


class IdeficsBlock(GatedBlock):
    def parts(self, cfg):
        return RMSNorm(cfg.hidden_size, cfg.rms_norm_eps), LlamaMLP(cfg), RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class FlamingoDecoder(Llama):
    """A Llama with gated blocks. Its own tensors keep their names; those of the blocks begin with gated_layers."""
    Block = GatedBlock

    def __init__(self, cfg):
        super().__init__(cfg)
        self.gated_layers = nn.ModuleList(self.Block(cfg) for _ in range(0, cfg.num_hidden_layers, cfg.cross_every))

    @property
    def blocks(self):
        return [*self.gated_layers, *self.model.layers]

    def forward(self, x, pos, lo, hi, rows=None, cache=None, z=None, first=None, end=None):
        """As Llama.forward. z (I Q, D): latents of all images; first, end (N,): those that each token sees"""
        angles = (pos[:, None] + self.cfg.first_position).float() * rope_frequencies(self.cfg, x.device)     # (N, K/2)
        cos, sin = angles.cos(), angles.sin()
        if self.cfg.sliding_window:
            lo = torch.maximum(lo, hi - self.cfg.sliding_window)
        last = len(self.model.layers) - 1
        for n, layer in enumerate(self.model.layers):
            if n % self.cfg.cross_every == 0:
                x = self.gated_layers[n // self.cfg.cross_every](x, z, first, end, cache)
            x = layer(x, cos, sin, lo, hi, rows if n == last else None, cache)
        return self.model.norm(x)


class IdeficsDecoder(FlamingoDecoder):
    Block = IdeficsBlock


class Flamingo(VLM):
    def __init__(self, cfg, *parts):
        super().__init__(cfg, *parts)
        if not isinstance(self.multi_modal_projector, Perceiver) or cfg.tokens != 1 or cfg.mask != "causal":
            stop("gated cross-attention needs connector=perceiver, tokens=1 and mask=causal, not "
                 f"{cfg.connector}, {cfg.tokens} and {cfg.mask}")
        if (D := self.multi_modal_projector.latent_embedding.shape[1]) != cfg.text.cross_width:
            stop(f"image features of width {D} need text.cross_width={D}, not {cfg.text.cross_width}")

    def inputs(self, ids, pos, images, cache=None):
        """-> x (N, C): token embeddings, the marker's among them; z, first, end: see FlamingoDecoder.forward"""
        x = self.language_model.embed(ids)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))                  # autocast does not cast embeddings
        z = self.image_features(images)                                        # (I, Q, D)
        marker = ids == self.cfg.image_token_index
        torch._assert_async(marker.sum() == len(z), "there must be as many image tokens as images")
        seen = torch.stack(last_image(marker, pos, z.shape[1]))                # (2, N)
        if cache is not None:
            chat = cache.slot // (cache.L * cache.group)                       # (N,) the prompt of each token
            if self in cache.fixed:                    # generated tokens see the last image of their prompt
                seen = cache.fixed[self][:, chat]
            else:
                cache.fixed[self] = seen.new_zeros(2, cache.B).scatter_reduce(1, chat.expand(2, -1), seen, "amax")
        return [x, z.flatten(0, 1), *seen]

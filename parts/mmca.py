"""Multi-modal causal attention (MMCA) of DeepSpeed-VisualChat: text attends to text and to images separately.

Source: arXiv 2309.14327, section 4.1 and figure 3. The results of two softmaxes are added:

    text token     out = attention(q, keys of text so far) + attention(q, keys of images so far); 0 without an image
    image token    out = its own value: an image token attends only to itself

There are no new parameters. A document of text alone gives the same bits as causal attention.

kernels.attention knows one span per query. One fact is enough to use it for these two sets of keys: the keys of one set
that lie in [lo, hi) are neighbours in the list of all keys of this set. With n[j] = number of such keys before key j,
their span in the list is [n[lo], n[hi]).

    N tokens   R queries (N, or fewer in the last layer)   M keys (N, or all slots of the cache)   H heads
    G key-value heads   K head width   S text tokens among the queries
"""

from typing import NamedTuple

import torch
import torch.nn as nn

from config import stop
from kernels.attention import attention
from kernels.rope import rope_qk
from model import VLM, Llama, LlamaAttention, LlamaLayer, take


class Queries(NamedTuple):
    """The text tokens among the queries of a layer, and what they see"""
    at: torch.Tensor      # (S,) their indices among the queries
    ends: list            # [(lo, hi), (lo, hi)]: their spans (S,) in the list of text keys, in the list of image keys


class Spans(NamedTuple):
    """Computed once per forward pass, because nonzero() is a host-device sync"""
    keys: list            # [indices of the text keys among all M keys, indices of the image keys]
    every: Queries        # of a layer in which all N tokens are queries
    last: Queries         # of the last layer, in which only `rows` are


def spans(image, keys, lo, hi, rows):
    """image (N,) bool: image tokens among the queries; keys (M,) bool: among the keys; rows (R,) or None -> Spans"""
    lists = [(~keys).nonzero()[:, 0], keys.nonzero()[:, 0]]
    before = [torch.cat([k.new_zeros(1, dtype=torch.int32), k.cumsum(0, dtype=torch.int32)]) for k in
              (~keys, keys)]                                                                   # two of (M + 1,)

    def queries(rows):
        at = (~take(image, rows)).nonzero()[:, 0]
        a, b = (take(t, rows)[at].long() for t in (lo, hi))
        return Queries(at, [(n[a], n[b]) for n in before])

    return Spans(lists, queries(None), queries(rows))


class MMCAAttention(LlamaAttention):
    def forward(self, x, cos, sin, spans, hi, rows=None, cache=None):
        """As LlamaAttention.forward, with Spans in place of lo"""
        q, k, v = (t.unflatten(-1, (-1, self.K)) for t in self.qkv(x, rows))         # (R, H, K), (N, G, K), (N, G, K)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope_qk(q, k, cos, sin, rows)
        own = take(v, rows).repeat_interleave(q.shape[1] // v.shape[1], 1)           # (R, H, K)
        if cache is not None:
            k, v = cache.append(self, k, v)                                          # (M, G, K)
        at, ends = spans.every if rows is None else spans.last
        text, image = (attention(q[at], k[some], v[some], *span) for some, span in zip(spans.keys, ends))  # (S, H, K)
        return self.o_proj(own.index_copy(0, at, text + image).flatten(1))


class MMCALayer(LlamaLayer):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.self_attn = MMCAAttention(cfg)


class MMCADecoder(Llama):
    """A Llama, Mistral or Qwen with MMCA: the same tensors under the same names"""

    def __init__(self, cfg):
        super().__init__(cfg)
        if cfg.sliding_window:
            stop(f"mask=mmca with sliding_window={cfg.sliding_window}: MMCA has no sliding window")
        self.model.layers = nn.ModuleList(MMCALayer(cfg) for _ in range(cfg.num_hidden_layers))

    def forward(self, x, pos, lo, hi, rows=None, cache=None, image=None):
        """As Llama.forward. image (N,) bool: the image tokens"""
        keys = image
        if cache is not None:
            keys, = cache.append(self, image)                                        # (M,) empty slots are in no span
        return super().forward(x, pos, spans(image, keys, lo, hi, rows), hi, rows, cache)


class VisualChat(VLM):
    def inputs(self, ids, pos, images, cache=None):
        return [*super().inputs(ids, pos, images, cache), ids == self.cfg.image_token_index]

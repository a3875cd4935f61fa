"""Multi-modal causal attention (MMCA) of DeepSpeed-VisualChat: text attends to text and to images separately.

Source: arXiv 2309.14327, section 4.1 and figure 3. The results of two softmaxes are added:

    text token     out = attention(q, keys of text so far) + attention(q, keys of images so far); 0 without an image
    image token    out = its own value: an image token attends only to itself

There are no new parameters. A document of text alone gives the same bits as causal attention.

kernels.attention knows one span per query. One fact is enough to use it for these two sets of keys: the keys of one set
that lie in [lo, hi) are neighbours in the list of all keys of this set. With n[j] = number of such keys before key j,
their span in the list is [n[lo], n[hi]).

    N tokens   R queries (N, or fewer in the last layer)   M keys (N, or all slots of the cache)   H heads
    G key-value heads   K head width   S queries that see keys: the text tokens, in the last layer all R
"""

from typing import NamedTuple

import torch
import torch.nn as nn

from config import stop
from kernels.attention import attention
from kernels.rope import rope_qk
from model import VLM, Llama, LlamaAttention, LlamaLayer, take


class Queries(NamedTuple):
    """Queries of a layer, and what they see"""
    at: torch.Tensor      # (S,) their indices among the queries; None: all
    ends: list            # [(lo, hi), (lo, hi)]: their spans (S,) in the list of text keys, in the list of image keys


class Spans(NamedTuple):
    """Computed once per forward pass"""
    keys: list            # [indices of the text keys among all M keys, indices of the image keys]
    every: Queries        # of a layer in which all N tokens are queries: the text tokens
    last: Queries         # of the last layer, in which only `rows` are: all of them
    image: torch.Tensor   # (R,) bool: the image tokens among `rows`


def indices_where(mask, count):
    """-> indices at which mask is true. count: how many; None: not known, so the CPU waits for a GPU to count them"""
    return (mask.nonzero() if count is None else mask.nonzero_static(size=count))[:, 0]


def spans(image, keys, lo, hi, rows, count=None):
    """image (N,) bool: image tokens among the queries; keys (M,) bool: among the keys; rows (R,) or None; count: number
    of image tokens, if the queries are the keys -> Spans"""
    lists = [indices_where(~keys, None if count is None else len(keys) - count), indices_where(keys, count)]
    before = [torch.cat([k.new_zeros(1, dtype=torch.int32), k.cumsum(0, dtype=torch.int32)]) for k in
              (~keys, keys)]                                                                   # two of (M + 1,)

    def queries(rows, at):
        a, b = (take(take(t, rows), at).long() for t in (lo, hi))
        return Queries(at, [(n[a], n[b]) for n in before])

    text = lists[0] if keys is image else indices_where(~image, None)
    return Spans(lists, queries(None, text), queries(rows, None), take(image, rows))


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
        text, image = (attention(take(q, at), k[some], v[some], *span) for some, span in zip(spans.keys, ends))
        out = text + image                                                           # (S, H, K)
        out = own.index_copy(0, at, out) if rows is None else torch.where(spans.image[:, None, None], own, out)
        return self.o_proj(out.flatten(1))


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

    def forward(self, x, pos, lo, hi, rows=None, cache=None, image=None, count=None):
        """As Llama.forward. image (N,) bool: the image tokens; count: their number"""
        keys = image
        if cache is not None:
            keys, count = *cache.append(self, image), None                           # (M,) empty slots are in no span
        return super().forward(x, pos, spans(image, keys, lo, hi, rows, count), hi, rows, cache)


class VisualChat(VLM):
    def inputs(self, ids, pos, images, cache=None):
        image = ids == self.cfg.image_token_index
        return [*super().inputs(ids, pos, images, cache), image, len(images) * self.cfg.image_tokens]

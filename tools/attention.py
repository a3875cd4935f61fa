"""Recompute one answer: the probability of each of its tokens, and what a decoder layer attends to in the image.

The model reads the conversation with its answer in one pass, as in training: no cache, all answer tokens at once.
Token t of the answer is predicted at the token before it. The row of that token is called row t:

    p[t, i]    probability of token i, given all tokens before token t: softmax of the logits, as generate() has them
               at temperature 1. The ids that generate() never chooses have probability 0
    a[t, j]    attention of row t to key j in one layer: softmax over the keys of the row's span, mean over heads
    b[j]       the same for a neutral question (the images with the text `neutral`), at the last token of its prompt
    map        a[t, j] / b[j] for the keys j of the image. 1 means: as much attention as without the question

The ratio is needed because some image tokens get much attention whatever the question is ("attention sinks": Xiao et
al. 2023, arXiv 2309.17453; in vision transformers: Darcet et al. 2023, arXiv 2309.16588).

The model's own attention does not keep the softmax. A hook reads the input of each layer's attention; queries, keys and
softmax are computed again from it, in fp32 or fp64. So model.py stays as it is.

    N tokens of the conversation   R tokens of the answer (one row each)   V vocabulary   H heads   K head width
    G key heads   L decoder layers   I images   n side of an image's grid of tokens
"""

import torch

from config import BadSample
from data import pack
from generate import with_marker
from kernels.cross_entropy import IGNORE
from kernels.rope import rope_ref
from model import logits_head
from parts.spans import span_ends

# connectors whose Q = n x n tokens lie row by row over the image
GRIDS = ("linear", "mlp", "norm_mlp", "linear_norm", "comm", "pool", "abstractor", "shuffle", "shuffle_linear")


def why_no_map(cfg):
    """VLMConfig -> None, or one line that says why this system has no heat map over its images"""
    if cfg.text.model_type in ("flamingo", "idefics"):
        return "no heat map: the decoder reads images in cross-attention layers, they are no tokens of the sequence"
    if cfg.mask == "mmca":
        return "no heat map: MMCA has two softmaxes, one over text and one over images, and no common distribution"
    if cfg.layout:
        return f"no heat map: an image is cut into several tiles (layout {cfg.layout.get('kind')})"
    if cfg.connector not in GRIDS or grid_side(cfg) ** 2 != cfg.image_tokens:
        return f"no heat map: the {cfg.image_tokens} tokens of the connector {cfg.connector} are no grid over the image"


def grid_side(cfg):
    """VLMConfig -> n, for images of n x n tokens"""
    return int(cfg.image_tokens**0.5 + 0.5)


def attention_over_keys(attn, x, cos, sin, lo, hi, rows):
    """An attention layer and its input (LlamaAttention.forward), rows (R,) -> a (R, H, N): softmax over each span"""
    q, k, _ = (t.unflatten(-1, (-1, attn.K)) for t in attn.qkv(x, rows))                     # (R, H, K), (N, G, K)
    if attn.q_norm is not None:
        q, k = attn.q_norm(q), attn.k_norm(k)
    r = 2 * cos.shape[-1]                             # Persimmon rotates only the first r of the K numbers of a head
    q, k = (torch.cat([rope_ref(t[..., :r], c, s), t[..., r:]], -1).to(torch.promote_types(t.dtype, torch.float32))
            for t, c, s in ((q, cos[rows], sin[rows]), (k, cos, sin)))
    scores = torch.einsum("rhk,nhk->rhn", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * attn.K**-0.5
    j = torch.arange(len(x), device=x.device)
    seen = (lo[rows, None] <= j) & (j < hi[rows, None])                                      # (R, N)
    return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)


def on_images(cfg, ids, found):
    """ids (N,) of a prompt, {layer: a (R, N or more)} -> (L, R, I, n, n): the keys of its I images"""
    keys, n = (ids == cfg.image_token_index).nonzero()[:, 0], grid_side(cfg)                 # (I n n,)
    return torch.stack([a[:, keys] for a in found.values()]).unflatten(-1, (-1, n, n))


def ratio(a, b):
    """a / b, where b may have underflowed to 0"""
    return a / b.clamp(min=torch.finfo(b.dtype).tiny)


@torch.no_grad()
def read_again(chat, prompt, answer, tiles, layers=()):
    """A Chat, ids of the prompt and of its answer (tensor, list), tiles from chat.look
    -> p (R, V), and {layer: a (R, N)} for each of `layers`, the mean over heads"""
    ids = [*prompt.tolist(), *answer]
    sample = (ids, [IGNORE] * len(prompt) + list(answer), torch.cat(tiles) if tiles else [])
    batch = pack([sample], chat.cfg.vision.image_size, span_ends(chat.cfg), chat.reader)
    device = next(chat.model.parameters()).device
    batch = [t.to(device) for t in batch[:6]]
    rows, found = (batch[1] != IGNORE).nonzero()[:, 0], {}                                   # (R,)

    def hook(layer):
        def keep(attn, args):
            found[layer] = attention_over_keys(attn, *args[:5], rows).mean(1).cpu()
        return chat.model.language_model.model.layers[layer].self_attn.register_forward_pre_hook(keep)

    training = [m for m in chat.model.modules() if m.training]
    chat.model.eval()
    hooks = [hook(layer) for layer in layers]
    try:
        logits = chat.model(*batch, head=logits_head)
    finally:
        for h in hooks:
            h.remove()
        for m in training:
            m.training = True
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits[:, sorted(chat.banned)] = -torch.inf
    return logits.softmax(-1).cpu(), found


def image_maps(chat, prompt, answer, tiles, blocks, neutral, layers):
    """-> p (R, V), map (L, R, I, n, n) and a (L, R, I, n, n) for `layers`. blocks: from chat.look. BadSample without
    images, and for a system whose images are no grid of tokens."""
    if not blocks or (reason := why_no_map(chat.cfg)):
        raise BadSample("no heat map: no image" if not blocks else reason)
    bare = chat.prompt([(with_marker(neutral, len(blocks)), None)], blocks)
    p, found = read_again(chat, prompt, answer, tiles, layers)
    a = on_images(chat.cfg, prompt, found)                                                   # (L, R, I, n, n)
    b = on_images(chat.cfg, bare, read_again(chat, bare, answer[:1], tiles, layers)[1])      # (L, 1, I, n, n)
    return p, ratio(a, b), a

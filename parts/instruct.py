"""InstructBLIP's Q-Former (arXiv 2305.06500, section 2.3): the instruction is read together with the queries.

In self-attention the queries of an image and the words of the instruction all see each other. Only the queries see the
image, and only their last states go to the language model. So the question decides which features become tokens. Words
have an MLP of their own in each layer. They have ids of their own, too: the published Q-Former is a BERT.

The instruction is the text of a conversation up to its first answer. Reader finds the words of this text. They travel
with the pixels of the images (Instructed), so the rest of the code does not know them.

    I images   P features per image   D their width   Q queries   E width of the Q-Former   C LLM width
    W words of all images; an image has counts[i] of them   T = I Q + W tokens of the Q-Former
"""

import json
from dataclasses import dataclass

import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F

from config import stop
from kernels.cross_entropy import IGNORE
from model import VLM, LayerNorm
from parts.cross import own_keys
from parts.qformer import QFormer, QFormerConfig, QFormerLayer


# ---- the words ------------------------------------------------------------------------------------------------------

class Instructed:
    """Pixels (I, 3, S, S) uint8 and the words (W,), counts (I,) int64 of their instructions. It replaces the pixels."""

    def __init__(self, pixels, words, counts):
        self.pixels, self.words, self.counts = pixels, words, counts

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, rows):
        assert rows == slice(None, 0), "only [:0] is needed, after the first token of an answer"
        return self.pixels[rows]

    @property
    def device(self):
        return self.pixels.device

    def to(self, *args, **kw):
        return Instructed(*(t.to(*args, **kw) for t in (self.pixels, self.words, self.counts)))

    def pin_memory(self):
        return Instructed(*(t.pin_memory() for t in (self.pixels, self.words, self.counts)))


class Reader:
    """([(ids, labels, ...)] of conversations, pixels of all their images) -> Instructed"""

    def __init__(self, tok, spec, image_id, Q, longest):
        """spec: content of the Q-Former's tokenizer.json; None: it uses the tokenizer of the language model"""
        self.tok, self.image_id, self.Q, self.longest = tok, image_id, Q, longest
        self.words = spec and tokenizers.Tokenizer.from_str(json.dumps(spec | {"padding": None, "truncation": None}))
        if self.words:
            self.words.enable_truncation(longest)

    def read(self, text):
        """An instruction -> ids of its words"""
        return self.words.encode(text).ids if self.words else self.tok.text(text)[0][: self.longest]

    def __call__(self, samples, pixels):
        words, counts = [], []
        for ids, labels, *_ in samples:
            if n := ids.count(self.image_id) // self.Q:
                end = next((i for i, y in enumerate(labels) if y != IGNORE), len(ids))
                own = self.read(self.tok.decode(ids[:end]).strip())
                words, counts = words + own * n, counts + [len(own)] * n
        return Instructed(pixels, *(torch.tensor(t, dtype=torch.long) for t in (words, counts)))


def reader(folder, cfg):
    """A model folder (formats.llava.Folder) and its VLMConfig -> Reader, or None where the connector needs no words"""
    if cfg.connector != "instruct":
        return None
    args, spec = InstructConfig(**cfg.connector_args), folder.words.get("tokenizer.json")
    if bool(spec) != (args.vocab_size > 0):
        stop(f"a Q-Former of {args.vocab_size} words (connector_args.vocab_size; 0: those of the language model) "
             f"{'has' if spec else 'without'} a folder qformer_tokenizer")
    return Reader(folder.tok, spec, cfg.image_token_index, cfg.tokens, args.max_position_embeddings)


# ---- the connector --------------------------------------------------------------------------------------------------

@dataclass
class InstructConfig(QFormerConfig):
    vocab_size: int = 0                      # 0: that of the language model, whose tokenizer then reads instructions
    max_position_embeddings: int = 512       # a longer instruction is cut

    def words(self, cfg):
        return self.vocab_size or cfg.text.vocab_size


class InstructLayer(QFormerLayer):
    """In the last layer, the MLP of the words has no effect, because nothing reads the words after it. It is built all
    the same: the published model has weights for it."""

    def __init__(self, cfg, D, looks):
        super().__init__(cfg, D, looks)
        E, hidden = cfg.hidden_size, cfg.intermediate_size
        self.word_fc1, self.word_fc2 = nn.Linear(E, hidden), nn.Linear(hidden, E)
        self.word_norm = LayerNorm(E, eps=cfg.layer_norm_eps)

    def forward(self, x, image, own, seen, at):
        """x (T, E), image (I P, D); at: places of the queries (I Q,) and of the words (W,) in x -> (T, E)"""
        x = self.attention_norm.add(x, self.attention(x, x, x, *own))[1]
        queries, words = self.look(x[at[0]], image, seen), x[at[1]]
        words = self.word_norm.add(words, self.word_fc2(F.gelu(self.word_fc1(words))))[1]
        return placed(queries, words, at)


def placed(queries, words, at):
    """Queries (I Q, ...) and words (W, ...) -> (T, ...): for each image its queries, then its words"""
    x = queries.new_empty(len(queries) + len(words), *queries.shape[1:])
    return x.index_copy(0, at[0], queries).index_copy(0, at[1], words)


class InstructQFormer(QFormer):
    """Image features (I, P, D), words (W,), counts (I,) -> (I, Q, C)"""

    def __init__(self, D, C, Q, cfg, vocab):
        super().__init__(D, C, Q, cfg)
        self.word_embedding = nn.Embedding(vocab, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)
        self.layers = nn.ModuleList(InstructLayer(cfg, D, looks=n % cfg.cross_attention_frequency == 0)
                                    for n in range(cfg.num_hidden_layers))

    def forward(self, image, words, counts):
        queries, _ = self.states(image, words, counts)
        return self.projection(queries).unflatten(0, (len(image), len(self.query_embedding)))

    def states(self, image, words, counts, causal=False, queries=True):
        """-> last states of the queries (I Q, E) and of the words (W, E). causal: queries see queries alone; a word
        sees the queries and the words up to itself. queries=False: there are none, words see words, images have P = 0
        """
        (I, P, _), Q, W, device = image.shape, queries * len(self.query_embedding), len(words), image.device
        before = counts.cumsum(0) - counts                                                # (I,) words of images before
        images, n = torch.arange(I, device=device), torch.arange(W, device=device)
        of_query, of_word = images.repeat_interleave(Q), images.repeat_interleave(counts, output_size=W)
        at = torch.arange(I * Q, device=device) + before[of_query], n + Q * (of_word + 1)  # places of queries, of words
        start, of = before + Q * images, placed(of_query, of_word, at)                     # (I,), (T,)
        hi = placed((start + Q)[of_query], at[1] + 1, at) if causal else (start + Q + counts)[of]  # (T,)
        own, seen = (start[of].int(), hi.int()), own_keys(I, Q, P, device)
        queries = self.query_embedding[:Q].to(image.dtype).expand(I, -1, -1).flatten(0, 1)        # (I Q, E)
        words = self.word_embedding(words) + self.position_embedding(n - before[of_word])  # (W, E)
        x, image = self.norm(placed(queries, words.to(image.dtype), at)), image.flatten(0, 1)
        for layer in self.layers:
            x = layer(x, image, own, seen, at)
        return x[at[0]], x[at[1]]


class InstructVLM(VLM):
    """A VLM whose images may be Instructed. Images without words have empty instructions."""

    def image_features(self, images):
        if not isinstance(images, Instructed):
            none = torch.zeros(len(images), dtype=torch.long, device=images.device)
            images = Instructed(images, none[:0], none)
        trained = any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            features = self.vision_tower(images.pixels)
        return self.multi_modal_projector(features, images.words, images.counts)

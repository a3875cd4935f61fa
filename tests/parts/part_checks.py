"""What every connector, tower, decoder and mask must satisfy, as functions for the tests of parts/."""

import math

import pytest
import torch
from conftest import example, tiny_config
from PIL import Image
from test_model import all_logits, gradients
from torch.utils.flop_counter import FlopCounterMode

import engine
from data import pack
from generate import generate
from kernels.cross_entropy import linear_cross_entropy_ref
from model import logits_head
from parts.build import build, image_layout
from parts.spans import span_ends
from run import plan


def random_model(cfg, seed=0):
    """VLMConfig -> a float64 model with random weights; norms near 1, gates open"""
    torch.manual_seed(seed)
    model = build(cfg)
    for n, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in n and n.endswith("weight") else 0.0, std=0.2)
    return model.double()


def config(text=None, vision=None, **fields):
    """The tiny LLaVA of conftest.py with other fields; text: a config class of parts/"""
    cfg = tiny_config()
    if text:
        cfg.text = text
    for k, x in (vision or {}).items():
        setattr(cfg.vision, k, x)
    for k, x in fields.items():
        setattr(cfg, k, x)
    return cfg


def samples(cfg):
    """One image, none, three, one again. Every document has supervised tokens"""
    Q = cfg.image_tokens
    if cfg.layout.get("kind") == "anyres":
        documents = [(23, 8)], [], [(5, 90), (8, 8), (9, 17)], [(90, 2)]
        return [sized(cfg, n, sizes) for n, sizes in enumerate(documents)]
    return [example(1, model_patches=Q), example(2, images=0, text=14), example(3, images=3, text=5, model_patches=Q),
            example(4, text=20, model_patches=Q)]


def sized(cfg, seed, sizes):
    """A sample of random tiles and text, for images of these sizes (w, h), which stand side by side"""
    layout, (_, labels, _) = image_layout(cfg), example(seed, images=0)
    block = [i for size in sizes for i in layout.block(Image.new("RGB", size))]
    tiles = sum(len(layout.cut(Image.new("RGB", size))) for size in sizes)
    ids, _, tiles = example(seed, images=tiles)
    return [1, *block, *ids[-9:]], [-100] * len(block) + labels[:-4] + ids[-4:], tiles


def check_packed(model, reader=None, dead="-"):
    """One stream of several documents = each document alone: loss and all gradients. dead: part of the names of weights
    that change nothing"""
    ends = span_ends(model.cfg)
    loss, together = gradients(model, [pack(samples(model.cfg), 8, ends, reader)])
    alone, single = gradients(model, [pack([s], 8, ends, reader) for s in samples(model.cfg)])
    assert abs(loss - alone) <= 1e-13 * abs(alone) and loss > 0
    assert together.keys() == single.keys() == {n for n, _ in model.named_parameters()}
    largest = max(float(g.abs().max()) for g in single.values())
    for n, g in single.items():
        error, scale = float((together[n] - g).abs().max()), float(g.abs().max())
        if n.endswith("k_proj.bias"):                          # true gradient 0: a bias adds the same to all scores
            assert error <= 1e-12 * largest, n
        else:
            assert error <= 1e-12 * scale and (scale > 0) != (dead in n), (n, error, scale)


def check_flops(model, most=1.01):
    """The plan counts the FLOPs that torch counts, to 1 %: it may count a gradient of pixels, which is not needed"""
    engine.choose(model, {"*": 1e-3}, torch.float64)
    batch = pack(samples(model.cfg), 8, span_ends(model.cfg))
    own = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1],           # the counter does not know it
           torch.ops.aten.convolution_backward:                                          # nor groups of channels
           lambda g, x, w, *_, **__: 4 * g[0] * math.prod(g[2:]) * math.prod(w)}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        model(*batch, head=linear_cross_entropy_ref).backward()
    assert 1 <= plan.step_flops(model, [batch]) / counter.get_total_flops() < most


def check_no_images(model):
    """Text alone: every parameter gets a gradient, those of tower and connector 0; nothing at all: no error, too"""
    ends = span_ends(model.cfg)
    for stream in ([example(2, images=0, text=14)], []):
        _, grads = gradients(model, [pack(stream, 8, ends)])
        assert grads.keys() == {n for n, _ in model.named_parameters()}
        for n, g in grads.items():
            assert not n.startswith(("vision_tower.", "multi_modal_")) or not g.any(), n


def check_rows(model):
    """The last layer computes only the rows with a label. Their logits = those of all rows"""
    batch = pack(samples(model.cfg), 8, span_ends(model.cfg))
    rows = torch.arange(len(batch.ids)) % 3 == 1                 # some of them are image tokens
    with torch.no_grad():
        some = all_logits(model, batch)[rows]
        few = model(*batch._replace(labels=torch.where(rows, 0, -100)), head=lambda h, w, *_: h @ w.T)
    assert (some - few).abs().max() < 1e-12 * some.abs().max()


def check_cache(model, tokens=6):
    """Greedy answers with the cache, all prompts at once = each token by a forward pass over all tokens so far"""
    prompts = [(torch.tensor(ids), images) for ids, _, images in samples(model.cfg)]
    fast = generate(model, [ids for ids, _ in prompts], torch.cat([i for _, i in prompts]), set(), tokens)
    for (ids, images), answer in zip(prompts, fast):
        ids, n = ids.tolist(), len(ids)
        for token in answer:
            batch = pack([(ids, [-100] * n + ids[n:], images)], 8, span_ends(model.cfg))
            with torch.no_grad():
                logits = all_logits(model, batch)[-1]
            logits[model.cfg.image_token_index] = -torch.inf
            assert logits.argmax() == token
            ids.append(token)
    assert len({tuple(a) for a in fast}) > 1                     # the prompts do not all give one answer


def check_groups(model, G=3):
    """G answers to each prompt, which passes through the model once = answers to G copies of each prompt: the tokens
    drawn with one seed, and all logits"""
    prompts = [(torch.tensor(ids), images) for ids, _, images in samples(model.cfg)]

    def answers(asked, **how):
        seen = []
        with pytest.MonkeyPatch.context() as m:
            m.setattr("generate.logits_head", lambda *a: (seen.append(logits_head(*a)), seen[-1])[1])
            return generate(model, [p for p, _ in asked], torch.cat([i for _, i in asked]), set(), 4, 1.0, **how), seen
    (alone, slow), (together, fast) = answers([p for p in prompts for _ in range(G)]), answers(prompts, group=G)
    assert together == alone and len({tuple(a) for a in alone}) > len(prompts)
    assert [len(x) for x in fast] == [len(prompts)] + 3 * [len(alone)]
    torch.testing.assert_close(torch.cat([fast[0].repeat_interleave(G, 0), *fast[1:]]), torch.cat(slow), rtol=1e-12,
                               atol=1e-12)

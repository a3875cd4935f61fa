"""The model against transformers in float64, and against itself: packed, permuted, perturbed, sliced, recomputed.

    N tokens   R tokens with a label   C width   H heads   G key-value heads   K head width   M MLP width
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import example, tiny_config, tiny_vlm
from kernel_cases import normal
from torch.utils.checkpoint import checkpoint

import engine
import lora
from config import Error
from data import pack
from formats import configs, names
from generate import generate
from kernels.cross_entropy import IGNORE
from kernels.norm import rms_norm_ref
from kernels.rope import rope_ref
from model import (VLM, Llama, TextConfig, VisionConfig, VisionModel, VLMConfig, logits_head,
                   rope_frequencies)
from parts.build import build
from parts.init import init_weights

TIGHT = 1e-12   # float64: some thousand roundings of 1.1e-16 of values near 1
PARITY = 1e-10  # float64 against another implementation: other orders of summation, amplified by a few layers


def all_logits(model, batch):
    """Logits of every token of a stream (N, V)"""
    return model(*batch._replace(labels=torch.zeros_like(batch.ids)), head=logits_head)


def gradients(model, batches):
    """Summed loss and its gradients by name"""
    model.zero_grad()
    loss = sum(model(*b) for b in batches)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(a, b):
    """Largest relative error of any tensor: norm of the difference / norm. Without k_proj.bias: it adds the same to all
    scores of a query, so its gradient is rounding."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-30)) for n in b if not n.endswith("k_proj.bias"))


# ---- parity with transformers ---------------------------------------------------------------------------------------

VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=10,
              patch_size=4)
TEXT = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=None)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
FAMILIES = {  # vision class, its settings, text class, its settings
    "clip + llama": ("CLIP", {}, "Llama", {}),
    "no groups": ("CLIP", {}, "Llama", {"num_key_value_heads": 4}),              # Llama 1 and 2, Vicuna
    "three heads, one group": ("CLIP", {}, "Llama", {"hidden_size": 24, "num_attention_heads": 3,
                                                         "num_key_value_heads": 1}),              # SmolLM2
    "clip with exact gelu": ("CLIP", {"hidden_act": "gelu"}, "Llama", {}),
    "siglip": ("Siglip", {}, "Llama", {}),
    "llama3 rope": ("CLIP", {}, "Llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("CLIP", {}, "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4., "rope_theta": 1e4}}),
    "biases": ("CLIP", {}, "Llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("CLIP", {}, "Llama", {"tie_word_embeddings": True}),
    "qwen2": ("CLIP", {}, "Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("CLIP", {}, "Qwen3", {"head_dim": 16}),
    "mistral with a window": ("CLIP", {}, "Mistral", {"sliding_window": 5}),
    "mistral without": ("CLIP", {}, "Mistral", {"sliding_window": None}),
}


def theirs(vision="CLIP", v={}, text="Llama", t={}, layer=-2, seed=0):
    """A tiny random LLaVA of transformers, fp64, attention by sdpa (its eager one has a softmax in fp32)."""
    T = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    vision = getattr(T, f"{vision}VisionConfig")(**VISION | v)
    siglip = vision.model_type.startswith("siglip")
    model = T.LlavaForConditionalGeneration(T.LlavaConfig(
        vision_config=vision, text_config=getattr(T, f"{text}Config")(**TEXT | t), image_token_index=3,
        image_seq_length=4, vision_feature_layer=layer, attn_implementation="sdpa",
        vision_feature_select_strategy="full" if siglip else "default",
        tie_word_embeddings=t.get("tie_word_embeddings", False)))
    for n, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in n and n.endswith("weight") else 0.0, std=0.2)
    return model.double().eval()


def exact_norms(model):
    """transformers computes the statistics of RMSNorm in fp32 even in a float64 model. This keeps float64."""
    def forward(m, x):
        return m.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.variance_epsilon))

    for m in model.modules():
        if type(m).__name__.endswith("RMSNorm"):
            m.forward = functools.partial(forward, m)
    return model


def ours(model):
    """Our model with the weights and the config of theirs"""
    c = model.config.to_dict()
    vision = configs.vision_config(c["vision_config"], c["vision_feature_layer"])
    mine = VLM(VLMConfig(vision, configs.text_config(c["text_config"]), "mlp", c["image_token_index"])).double()
    state = {names.rename(k): x for k, x in model.state_dict().items()}
    mine.load_state_dict({k: state[k] for k in mine.state_dict()})
    return mine


def pixels(images, cfg):
    """uint8 -> pixel_values as the image processors of transformers compute them"""
    mean, std = (torch.tensor(t).view(1, 3, 1, 1) for t in (cfg.image_mean, cfg.image_std))
    return (images.float() / 255 - mean) / std


def their_logits(model, examples, cfg, dtype=torch.float64):
    """One padded batch -> logits of the real tokens, in the order of the stream"""
    n = [len(ids) for ids, _, _ in examples]
    ids = torch.tensor([ids + [0] * (max(n) - len(ids)) for ids, _, _ in examples])
    mask = torch.arange(max(n)) < torch.tensor(n)[:, None]
    images = torch.cat([i for _, _, i in examples])
    seen = pixels(images, cfg).to(dtype) if len(images) else None
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask.long(), pixel_values=seen)
    return out.logits[mask]


def sample(seed, images=1, text=9):
    return example(seed, text=text, images=images, side=10)


RAGGED = [sample(1), sample(2, 0, 14), sample(3, 3, 5), sample(4, 1, 2)]
GROUPS = [[sample(1, 0)], [sample(2)], [sample(3, 3)], RAGGED]                   # no, one, three pictures; all of it


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name):
    """float64 and fp32: text alone, one image, three images, and all of them, as one ragged batch there and one packed
    sequence here. Then greedy answers, token for token, until EOS or for 12 tokens, each side with its own cache."""
    reference = exact_norms(theirs(*FAMILIES[name]))
    model = ours(reference)
    for examples in GROUPS:
        with torch.no_grad():
            mine = all_logits(model, pack(examples, 10))
        true = their_logits(reference, examples, model.cfg.vision)
        assert mine.shape == true.shape and true.std() > 0.1
        assert (mine - true).abs().max() <= PARITY * max(1, true.abs().max())
    n = max(len(ids) for ids, _, _ in RAGGED)
    ids = torch.tensor([[0] * (n - len(ids)) + ids for ids, _, _ in RAGGED])                     # padded on the left
    mask = torch.arange(n, 0, -1) <= torch.tensor([len(ids) for ids, _, _ in RAGGED])[:, None]
    images = torch.cat([i for _, _, i in RAGGED])
    out = reference.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=False,
                             pixel_values=pixels(images, model.cfg.vision).double(), suppress_tokens=[3],
                             eos_token_id=2, pad_token_id=0)
    true = [(a + [2])[: (a + [2]).index(2)] for a in out[:, n:].tolist()]
    assert generate(model, [torch.tensor(ids) for ids, _, _ in RAGGED], images, {2}, 12) == true
    assert len({i for a in true for i in a}) > 4
    with torch.no_grad():
        mine = all_logits(model.float(), pack(RAGGED, 10))
    true = their_logits(theirs(*FAMILIES[name]).float(), RAGGED, model.cfg.vision, torch.float32)
    assert (mine - true).abs().max() <= 1e-5 * max(1, true.abs().max())


def bf16_errors(name, seed):
    """Root mean square error of bf16 logits against float64 logits of the same, bf16 weights -> ours, theirs"""
    reference = theirs(*FAMILIES[name], seed=seed)
    for p in reference.parameters():
        p.data = p.data.bfloat16().double()
    model = ours(reference).bfloat16()
    examples = [sample(10 * seed + i, n, text) for i, (n, text) in enumerate([(1, 9), (0, 14), (3, 5), (1, 2)])]
    theirs16 = their_logits(copy.deepcopy(reference).bfloat16(), examples, model.cfg.vision, torch.bfloat16)
    true = their_logits(exact_norms(reference), examples, model.cfg.vision)
    with torch.no_grad():
        mine = all_logits(model, pack(examples, 10))
    return [((x.double() - true).square().mean().sqrt() / true.std()).item() for x in (mine, theirs16)]


@pytest.mark.parametrize("name", ["clip + llama", "siglip", "qwen3", "mistral with a window"])
def test_bf16_errs_as_little_as_transformers(name):
    """At most twice the error of transformers, over three models together. A smaller bound would depend on the BLAS:
    the same ratio between two attentions of transformers, eager and sdpa, is between 0.87 and 1.2."""
    mine, other = (torch.tensor(e).norm() for e in zip(*(bf16_errors(name, seed) for seed in range(3))))
    assert mine <= 2 * other and 0.005 < other < 0.1


def test_8_bit_values_exceed_the_bf16_limit(monkeypatch):
    import model
    exact = model.attention
    monkeypatch.setattr(model, "attention", lambda q, k, v, *spans: exact(
        q, k, v.to(torch.float8_e4m3fn).to(v.dtype) if v.dtype == torch.bfloat16 else v, *spans))
    mine, other = bf16_errors("clip + llama", 0)
    assert mine > 2 * other


@pytest.mark.parametrize("wrong", [dict(hidden_act="gelu_pytorch_tanh"), dict(feature_layer=-1), dict(feature_layer=-3),
                                   dict(layer_norm_eps=1e-2), dict(rope_theta=5e5), dict(rms_norm_eps=1e-2)])
def test_a_misread_config_changes_the_logits(wrong):
    """Another activation, layer, epsilon or rope base: more than a thousand times the tolerance."""
    reference = exact_norms(theirs())
    model = ours(reference)
    with torch.no_grad():
        before = all_logits(model, pack(RAGGED, 10))
    state = {names.rename(k): x for k, x in reference.state_dict().items()}
    cfg = model.cfg
    for key, value in wrong.items():
        setattr(cfg.vision if hasattr(cfg.vision, key) else cfg.text, key, value)
    broken = VLM(cfg).double()
    broken.load_state_dict({k: state[k] for k in broken.state_dict()})
    with torch.no_grad():
        assert (all_logits(broken, pack(RAGGED, 10)) - before).abs().max() > 1000 * PARITY


@pytest.mark.parametrize("layer", [-1, -2, 0, 1])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_features_equal_those_of_transformers(registers, layer):
    T = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    how = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4, mlp_ratio=2)
    config = getattr(T, f"{kind}Config")(**how, **({"num_register_tokens": registers} if registers else {}))
    reference = getattr(T, f"{kind}Model")(config).double().eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.3)
    cfg = VisionConfig(config.model_type, 32, 64, 3, 2, 8, 4, "gelu", config.layer_norm_eps, registers, layer)
    model = VisionModel(cfg).double()
    spelt = [("cls_token", "class_embedding"), ("position_embeddings", "position_embedding.weight"), (".lambda1", ""),
             ("patch_embeddings.projection", "patch_embedding"), ("encoder.layer.", "encoder.layers."),
             (".norm", ".layer_norm"), ("attention.o_proj", "attention.out_proj"), (".attention.", ".self_attn.")]
    state = {}
    for k, x in reference.state_dict().items():
        for a, b in spelt:
            k = k.replace(a, b)
        state[k] = x
    want = model.state_dict()
    model.load_state_dict({k: state[k].view(want[k].shape) for k in want})
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        mine = model(images)
        true = reference(pixel_values=pixels(images, cfg).double(), output_hidden_states=True).hidden_states[layer]
    assert mine.shape == (3, 5 + registers, 32)
    assert (mine - true).abs().max() <= PARITY * true.abs().max()


# ---- positions ------------------------------------------------------------------------------------------------------

GOLDEN = {  # head size, base, scaling, {index: frequency}, as published
    "default": (128, 1e4, None, {1: 8.65964353e-01, 15: 1.15478203e-01, 28: 1.77827943e-02, 29: 1.53992651e-02,
                                 31: 1.15478197e-02, -1: 1.15478193e-04}),
    "llama 3.1": (128, 5e5, LLAMA3 | {"original_max_position_embeddings": 8192},
                  {1: 8.14617217e-01, 15: 4.61640507e-02, 28: 3.21144611e-03, 29: 2.16657063e-03, 31: 8.56751460e-04,
                   -1: 3.06892588e-07}),
    "llama 3.2 1B": (64, 5e5, LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
                     {1: 6.63601279e-01, 15: 1.29054801e-03, 28: 3.22293289e-07, 29: 2.13874230e-07,
                      -1: 9.41830649e-08}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_rope_frequencies_are_the_published_ones(name):
    K, theta, scaling, golden = GOLDEN[name]
    f = rope_frequencies(TextConfig(head_dim=K, rope_theta=theta, rope_scaling=scaling))
    assert f.dtype == torch.float32 and f.shape == (K // 2,)
    for i, value in golden.items():
        assert float(f[i]) == pytest.approx(value, rel=2.4e-7)                  # two units in the last place


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"type": "linear", "factor": 4.}], ids=["plain", "llama3", "linear"])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rotations_equal_those_of_transformers(theta, scaling):
    T = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
    how = {"rope_type": "default"} | (scaling or {})
    how["rope_type"] = how.pop("type", how["rope_type"])
    config = T.LlamaConfig(**TEXT, rope_parameters=how | {"rope_theta": theta}, max_position_embeddings=131072)
    pos = torch.tensor([0, 1, 4095, 4096, 4097, 100_000])
    x = torch.randn(len(pos), 2, 8)
    cos, sin = LlamaRotaryEmbedding(config)(x, pos[None])
    true, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    angles = pos[:, None].float() * rope_frequencies(TextConfig(head_dim=8, rope_theta=theta, rope_scaling=scaling))
    mine = rope_ref(x, angles.cos(), angles.sin())
    torch.testing.assert_close(mine, true[0].transpose(0, 1), rtol=0, atol=1e-6)
    pairs = torch.stack([x[..., ::2] * angles.cos()[:, None] - x[..., 1::2] * angles.sin()[:, None],
                         x[..., 1::2] * angles.cos()[:, None] + x[..., ::2] * angles.sin()[:, None]], -1).flatten(-2)
    assert (pairs - true[0].transpose(0, 1)).abs().max() > 0.1                  # rotating neighbouring pairs differs


def test_positions_stay_exact_in_a_bf16_model():
    """Casting the model must not round the angles: 4,097 and 4,096 are the same value in bf16."""
    model = tiny_vlm(dtype=torch.bfloat16)
    assert not list(model.buffers())                                            # nothing that a wrapper can cast
    f = rope_frequencies(model.cfg.text)
    assert f.dtype == torch.float32
    x, spans = torch.randn(2, 32, dtype=torch.bfloat16), (torch.zeros(2).int(), torch.arange(1, 3).int())
    a, b = (model.language_model(x, torch.tensor([0, at]), *spans)[1] for at in (4096, 4097))
    assert not torch.equal(a, b)


def test_an_unknown_rope_is_refused():
    with pytest.raises(ValueError, match="'yarn' is not supported: default, linear or llama3"):
        rope_frequencies(TextConfig(rope_scaling={"rope_type": "yarn"}))


# ---- images ---------------------------------------------------------------------------------------------------------

def test_patches_are_those_of_a_convolution():
    """Every pixel and channel has its own value, and the side is not a multiple of the patch side."""
    cfg = VisionConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=11, patch_size=3)
    model = VisionModel(cfg).double()
    init_weights(model)
    images = (torch.arange(2 * 3 * 11 * 11) * 7 % 256).to(torch.uint8).view(2, 3, 11, 11)
    e = model.embeddings
    conv = e.patch_embedding(pixels(images, cfg).double()).flatten(2).transpose(1, 2)       # (I, P, D)
    mine = (e(images) - e.position_embedding.weight)[:, 1:]
    torch.testing.assert_close(mine, conv, rtol=TIGHT, atol=TIGHT)
    columns_first = e.patch_embedding(pixels(images, cfg).double()).transpose(2, 3).flatten(2).transpose(1, 2)
    assert (columns_first - mine).abs().max() > 1e-2


def test_pixels_are_normalised_by_mean_and_std():
    cfg = tiny_config().vision
    model = tiny_vlm().vision_tower.vision_model.embeddings
    model.patch_embedding.weight.data.zero_()[:3, :, 0, 0] = torch.eye(3)         # reads one pixel of each patch
    model.position_embedding.weight.data.zero_()
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    for c in range(3):
        images[c, c] = 255
    seen = model(images)[:, 1:, :3]                                                        # (3, P, 3)
    for c in range(3):
        want = [((i == c) - cfg.image_mean[i]) / cfg.image_std[i] for i in range(3)]
        assert (seen[c] - torch.tensor(want)).abs().max() <= 1e-6


def test_a_frozen_tower_builds_no_graph():
    model = tiny_vlm()
    model.vision_tower.requires_grad_(False)
    images = sample(0, 2)[2][:, :, :8, :8]
    model.eval()
    with torch.no_grad():
        calm = model.vision_tower(images)
    model.train()
    for seed in (1, 2):
        torch.manual_seed(seed)
        seen = []
        hook = model.vision_tower.register_forward_hook(lambda m, i, o: seen.append(o))
        z = model.image_features(images)
        hook.remove()
        assert torch.equal(seen[0], calm) and seen[0].grad_fn is None and z.grad_fn is not None
    loss, got = gradients(model, [pack([example(1)], 8)])
    assert not any(n.startswith("vision_tower") for n in got) and all(got[n].any() for n in got if "projector" in n)


def test_a_trained_tower_gets_gradients():
    _, got = gradients(tiny_vlm(), [pack([example(1)], 8)])
    assert all(g.isfinite().all() and g.any() for n, g in got.items() if not n.endswith("k_proj.bias"))
    assert {n.split(".")[0] for n in got} == {"vision_tower", "multi_modal_projector", "language_model"}


def test_an_image_affects_its_own_sample_alone():
    """Another image j changes sample j alone; the others keep every bit. Swapping two images swaps the logits, up to
    the last bits: a product may sum its rows in another order."""
    examples = [example(1, images=1), example(2, images=2), example(3, images=0), example(4, images=1)]
    batch = pack(examples, 8)
    model = tiny_vlm()
    owner = torch.tensor([i for i, (ids, _, _) in enumerate(examples) for _ in ids])
    with torch.no_grad():
        before = all_logits(model, batch)
        for image, owned_by in enumerate([0, 1, 1, 3]):
            images = batch.images.clone()
            images[image] = 255 - images[image]
            changed = (all_logits(model, batch._replace(images=images)) != before).any(1)
            assert set(owner[changed].tolist()) == {owned_by}
        twins = [example(5), example(5)]
        twins[1] = (*twins[1][:2], 255 - twins[1][2])
        a, b = (all_logits(model, pack(order, 8)) for order in (twins, twins[::-1]))
    n = len(twins[0][0])
    assert not torch.equal(a[:n], a[n:])
    torch.testing.assert_close(torch.cat([b[n:], b[:n]]), a, rtol=TIGHT, atol=TIGHT)
    assert (b - a).abs().max() > 1e-3


def test_without_images_the_tower_gets_zero_gradients():
    """Ranks without an image must take part in all-reduce: every parameter gets a gradient, the tower's is zero."""
    model = tiny_vlm()
    _, got = gradients(model, [pack([example(1, images=0)], 8)])
    assert got.keys() == dict(model.named_parameters()).keys()
    assert not any(g.any() for n, g in got.items() if not n.startswith("language_model"))
    _, both = gradients(model, [pack([example(1, images=0)], 8), pack([example(2)], 8)])
    _, alone = gradients(model, [pack([example(2)], 8)])
    tower = [n for n in both if not n.startswith("language_model")]
    assert all(torch.equal(both[n], alone[n]) for n in tower)


@pytest.mark.parametrize("images, says", [(0, "more image placeholders"), (1, "more image placeholders"),
                                          (3, "more image features")])
def test_images_and_placeholders_must_match(images, says):
    batch = pack([example(1), example(2)], 8)
    given = batch._replace(images=torch.cat([batch.images] * 2)[:images])
    with pytest.raises(RuntimeError, match=says):
        tiny_vlm()(*given)


@pytest.mark.parametrize("examples", [[], [example(1, answer=0)]], ids=["no tokens", "no labels"])
def test_without_labels_all_gradients_are_zero(examples):
    model = tiny_vlm()
    loss, got = gradients(model, [pack(examples, 8)])
    assert loss == 0 and got.keys() == dict(model.named_parameters()).keys() and not any(g.any() for g in got.values())


# ---- packing --------------------------------------------------------------------------------------------------------

PACKED = [example(1), example(2, text=17, answer=9), example(3, images=0), example(4, images=3, text=5)]


@pytest.mark.parametrize("bug", [None, "no isolation", "labels cross the border"])
def test_packed_equals_one_by_one(bug):
    """Loss and gradients in float64. Two wrong ways of packing exceed the same limit."""
    model = tiny_vlm()
    alone, want = gradients(model, [pack([e], 8) for e in PACKED])
    batch = pack(PACKED, 8)
    if bug == "no isolation":
        batch = batch._replace(lo=torch.zeros_like(batch.lo))
    elif bug == "labels cross the border":
        labels = torch.tensor([i for _, labels, _ in PACKED for i in labels][1:] + [IGNORE])
        labels[len(PACKED[0][0]) - 1] = PACKED[1][0][0]
        batch = batch._replace(labels=labels)
    loss, got = gradients(model, [batch])
    error = max(worst(got, want), abs(loss - alone) / alone)
    assert error > 1000 * TIGHT if bug else error <= TIGHT


def test_positions_restart_in_every_document():
    """Rotations depend on differences of positions alone. So positions that do not restart change the logits by no more
    than the rounding of fp32 angles, and the test must read the positions themselves."""
    batch = pack(PACKED, 8)
    assert batch.pos.tolist() == [i for ids, _, _ in PACKED for i in range(len(ids))]
    with torch.no_grad():
        model = tiny_vlm()
        here, far = all_logits(model, batch), all_logits(model, batch._replace(pos=batch.pos + 1000))
        wrong = all_logits(model, batch._replace(pos=batch.pos // 2))
    assert (here - far).abs().max() <= 1e-2 < (here - wrong).abs().max()


def test_the_order_of_documents_does_not_matter():
    model = tiny_vlm()
    with torch.no_grad():
        one = all_logits(model, pack(PACKED, 8)).split([len(e[0]) for e in PACKED])
        other = all_logits(model, pack(PACKED[::-1], 8)).split([len(e[0]) for e in PACKED[::-1]])
    for a, b in zip(one, other[::-1]):
        torch.testing.assert_close(a, b, rtol=TIGHT, atol=TIGHT)


def test_a_document_does_not_affect_the_others():
    model = tiny_vlm()
    batch = pack(PACKED, 8)
    n = len(PACKED[0][0])
    ids = batch.ids.clone()
    ids[5:n] = torch.randint(5, 500, (n - 5,), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        before, after = all_logits(model, batch), all_logits(model, batch._replace(ids=ids))
    assert torch.equal(before[n:], after[n:]) and not torch.equal(before[:n], after[:n])


@pytest.mark.parametrize("text", [{}, {"sliding_window": 4}, {"qk_norm": True, "qkv_bias": True}])
def test_the_last_layer_computes_labelled_rows_alone(text):
    """Values and gradients are those of the whole computation, sliced."""
    model = tiny_vlm(**text)
    batch = pack(PACKED, 8)
    rows = batch.labels != IGNORE
    x = torch.randn(len(batch.ids), 32, dtype=torch.float64, requires_grad=True)
    lm, spans = model.language_model, (batch.pos, batch.lo, batch.hi)
    few, all_of_them = lm(x, *spans, rows=rows.nonzero()[:, 0]), lm(x, *spans)[rows]
    torch.testing.assert_close(few, all_of_them, rtol=TIGHT, atol=TIGHT)
    up = torch.randn(few.shape, dtype=torch.float64)
    wanted = [x, *lm.model.layers.parameters()]
    for a, b in zip(torch.autograd.grad(few, wanted, up), torch.autograd.grad(all_of_them, wanted, up)):
        torch.testing.assert_close(a, b, rtol=TIGHT, atol=TIGHT * float(b.abs().max()))
    seen = []
    hook = lm.model.layers[-1].mlp.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    model(*batch)
    hook.remove()
    assert seen == [int(rows.sum())] and seen[0] < len(batch.ids)


# ---- one decoder layer ----------------------------------------------------------------------------------------------

N, R = 23, 7
H, G, K, C, M = 4, 2, 8, 32, 48      # of conftest.tiny_config


def layer(kind):
    m = tiny_vlm(num_hidden_layers=1, qkv_bias=kind == "biases", mlp_bias=kind == "biases").train()
    if kind == "nf4 and dropout":
        lora.quantize_base(m)
    if kind in ("adapters", "dropout", "nf4 and dropout"):
        lora.add_adapters(m, 2, 4, 0.5 if "dropout" in kind else 0.0, "all-linear")
        for n, p in m.double().named_parameters():
            p.requires_grad_("lora_" in n)
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.2)
    elif kind in ("frozen", "q_proj alone"):
        for n, p in m.named_parameters():
            p.requires_grad_("q_proj" in n and kind != "frozen")
    return m.language_model.model.layers[0]


def stream():
    angles = torch.arange(N)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).double()
    return normal(N, C), angles.cos(), angles.sin(), torch.zeros(N, dtype=torch.int32), torch.arange(1, N + 1).int()


def layer_gradients(f, block, args, rows):
    """-> output, gradient of x and of every trained parameter"""
    x = args[0].detach().requires_grad_()
    torch.manual_seed(5)                                                             # of dropout
    out = f(x, *args[1:], rows)
    wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad(out, wanted, normal(*out.shape, seed=3))]


def textbook(block):
    """The layer with plain torch operators and their own gradients. Only the weights of the block are used."""
    a, m = block.self_attn, block.mlp

    def call(f, x):
        y = F.linear(x, f.weight, f.bias)
        return y + f.scale * (x @ f.lora_A.weight.T @ f.lora_B.weight.T) if hasattr(f, "lora_A") else y

    def forward(x, cos, sin, lo, hi, rows):
        y = rms_norm_ref(x, block.input_layernorm.weight, block.input_layernorm.eps)
        q, k, v = (call(f, y).unflatten(-1, (-1, K)) for f in (a.q_proj, a.k_proj, a.v_proj))
        q, k = rope_ref(q, cos, sin), rope_ref(k, cos, sin)
        k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
        o = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), is_causal=True).transpose(0, 1)
        x = x + call(a.o_proj, o.flatten(1))
        y = rms_norm_ref(x, block.post_attention_layernorm.weight, block.post_attention_layernorm.eps)
        x = x + call(m.down_proj, F.silu(call(m.gate_proj, y)) * call(m.up_proj, y))
        return x if rows is None else x[rows]
    return forward


@pytest.mark.parametrize("rows", [None, torch.arange(N - R, N)], ids=["all", "rows"])
@pytest.mark.parametrize("kind", ["biases", "frozen", "adapters", "q_proj alone"])
def test_gradients_equal_those_of_a_textbook_layer(kind, rows):
    block, args = layer(kind), stream()
    true = layer_gradients(textbook(block), block, args, rows)
    for mine, true in zip(layer_gradients(block, block, args, rows), true, strict=True):
        torch.testing.assert_close(mine, true, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("kind", ["biases", "dropout"])
def test_a_recomputed_layer_keeps_every_bit(kind):
    block, args = layer(kind), stream()
    again = layer_gradients(lambda *a: checkpoint(block, *a, use_reentrant=False), block, args, None)
    assert all(map(torch.equal, layer_gradients(block, block, args, None), again))


def test_a_layer_with_adapters_compiles_as_one_graph():
    """One graph for all lengths: with NF4, adapters and dropout, which replace most of the layer."""
    block = layer("nf4 and dropout")
    whole = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for args in (stream(), [t[:11] for t in stream()]):
        for mine, true in zip(layer_gradients(whole, block, args, None), layer_gradients(block, block, args, None)):
            torch.testing.assert_close(mine, true, rtol=TIGHT, atol=TIGHT)


# elements per token that autograd saves in every layer, and what one kind of training adds
ALWAYS = 2 * C + 2 + H * K + 2 * G * K + 2 * M       # x before each norm, norm statistics, q, k and v, gate and up
SAVED = {"frozen": 0,                                # a frozen linear layer saves nothing
         "q_proj alone": C,                          # its input
         "biases": 2 * C + H * K + M,                # both norms' outputs, attention output, silu(gate) * up
         "adapters": 2 * C + H * K + M + 7 * 2}      # the same, and seven products with A, of rank 2


@pytest.mark.parametrize("kind", SAVED)
def test_a_layer_saves_these_bytes_for_backward(kind):
    block, args, seen = layer(kind), stream(), {}
    shared = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *args[1:])}    # weights, angles, spans

    def save(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        out = block(args[0].detach().requires_grad_(), *args[1:])
    assert out.shape == (N, C)                                               # alive: no address is used twice
    assert sum(n for at, n in seen.items() if at not in shared) == N * 8 * (ALWAYS + SAVED[kind])


class Syncs(torch.utils._python_dispatch.TorchDispatchMode):
    """Operators whose result has a size, or is a value, that only the GPU knows: each is a host-device sync"""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.__name__.partition(".")[0]
        if name in ("nonzero", "masked_select", "masked_scatter_backward", "_local_scalar_dense", "_unique2", "equal"):
            self.names.append(name)
        return f(*args, **kwargs or {})


@pytest.mark.parametrize("stage", ["align", "sft"])
def test_a_step_has_no_host_device_sync(stage):
    """Batch.to counts the tokens with a label on the CPU. For a batch without `rows`, the model asks the GPU."""
    m = tiny_vlm().train()
    for n, p in m.named_parameters():
        p.requires_grad_(stage == "sft" or "multi_modal" in n)
    batch = pack([example(1), example(2, images=0), example(3, text=30)], 8)
    for b, waits in ((batch.to("cpu"), []), (batch, ["nonzero"])):
        with Syncs() as syncs:
            m(*b).backward()
        assert syncs.names == waits


# ---- around the model -----------------------------------------------------------------------------------------------

def test_a_tied_head_is_the_embedding():
    model = tiny_vlm(tie_word_embeddings=True)
    names = [n for n, _ in model.named_parameters()]
    lm = model.language_model
    assert lm.head_weight is lm.model.embed_tokens.weight and not any("lm_head" in n for n in names)
    assert not any("lm_head" in n for n in model.state_dict())
    batch = pack([example(1)], 8)
    _, got = gradients(model, [batch])
    apart = tiny_vlm()
    apart.load_state_dict({**model.state_dict(), "language_model.lm_head.weight": lm.head_weight.data})
    _, two = gradients(apart, [batch])
    name = "language_model.model.embed_tokens.weight"
    assert worst({name: got[name]}, {name: two[name] + two["language_model.lm_head.weight"]}) <= TIGHT
    twin = tiny_vlm(seed=1, tie_word_embeddings=True)
    twin.load_state_dict(model.state_dict())
    assert twin.language_model.head_weight is twin.language_model.model.embed_tokens.weight


def test_recomputing_blocks_changes_no_bit():
    batches = [pack(PACKED, 8)]
    plain = tiny_vlm()
    model = tiny_vlm()
    world = engine.World(0, 1, torch.device("cpu"), torch.float64)
    blocks = [*model.vision_tower.vision_model.encoder.layers, *model.language_model.model.layers]
    calls = []
    for b in blocks:
        b.mlp.register_forward_pre_hook(lambda m, i: calls.append(m))
    model = engine.parallelize(model, world, blocks, recompute="block")
    (a, want), (b, got) = gradients(plain, batches), gradients(model, batches)
    assert a == b and got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert len(calls) == 2 * len(blocks)  # computed twice


def test_autocast_errs_at_most_twice_as_much():
    """Gradients of fp32 weights under bf16 autocast, and those of a bf16 model, against float64."""
    def flat(g):
        return torch.cat([g[n].double().flatten() for n in sorted(g)])

    model, batch, seen = tiny_vlm(), pack(PACKED, 8), []
    _, true = gradients(model, [batch])
    _, low = gradients(tiny_vlm(dtype=torch.bfloat16), [batch])
    model.float()
    hook = model.language_model.model.layers[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        _, got = gradients(model, [batch])
    hook.remove()
    assert seen == [torch.bfloat16] and all(g.dtype == torch.float32 for g in got.values())
    assert (flat(got) - flat(true)).norm() <= 2 * (flat(low) - flat(true)).norm() <= 0.1 * flat(true).norm()
    assert torch.cosine_similarity(flat(got), flat(true), dim=0) >= 0.999


def test_feature_layers_count_from_the_embeddings():
    depths = {layer: VisionConfig(num_hidden_layers=4, feature_layer=layer).depth for layer in (-5, -2, -1, 0, 1, 4)}
    assert depths == {-5: 0, -2: 3, -1: 4, 0: 0, 1: 1, 4: 4}
    for layer in (5, -6):
        with pytest.raises(AssertionError, match="of a ViT of 4 blocks"):
            VisionConfig(num_hidden_layers=4, feature_layer=layer).depth


def test_initial_weights_follow_seed_and_table():
    cfg = tiny_config()
    one, same, other = VLM(cfg), VLM(cfg), VLM(cfg)
    for model, seed in ((one, 0), (same, 0), (other, 1)):
        init_weights(model, seed)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values()))
    assert not torch.equal(one.language_model.head_weight, other.language_model.head_weight)
    for name, p in one.named_parameters():
        if "norm" in name:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        elif "o_proj" in name or "out_proj" in name or "down_proj" in name or "fc2" in name:
            assert not p.any(), name
        elif "projector" in name:
            assert p.any() and p.abs().max() <= 32**-0.5, name                   # U(-1 / sqrt(in), 1 / sqrt(in))
            assert p.abs().max() > 0.8 * 32**-0.5, name
    alone = VLM(cfg).multi_modal_projector                                       # as llava.load_model does
    init_weights(alone, 0)
    assert alone.linear_1.weight.abs().max() > 0.8 * 32**-0.5


def test_an_unknown_connector_is_refused():
    with pytest.raises(Error, match="connector 'conv': linear, mlp"):
        build(VLMConfig(tiny_config().vision, tiny_config().text, "conv"))


def test_a_language_model_alone_reads_text():
    """demo/pretrain.py trains one."""
    cfg = tiny_config().text
    lm = Llama(cfg).double()
    init_weights(lm)
    lo, hi = torch.zeros(4).int(), torch.arange(1, 5).int()
    h = lm(lm.model.embed_tokens(torch.tensor([1, 5, 6, 7])), torch.arange(4), lo, hi)
    assert h.shape == (4, 32) and logits_head(h, lm.head_weight, None).shape == (4, 512)

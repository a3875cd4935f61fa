"""Vision towers with LLMs, as a LLaVA that transformers wrote: what test_model.py shows of CLIP with all LLMs and of
SigLIP with Llama, for other pairs, and through the files."""

import copy

import pytest
import torch
from conftest import example
from test_llava import EXAMPLES, PRE, add_files, random
from test_model import PARITY, TEXT, VISION, all_logits, exact_norms, pixels, their_logits

from data import pack
from formats import llava
from generate import generate

T = pytest.importorskip("transformers")
TOWERS = {"siglip": T.SiglipVisionConfig(**VISION | {"image_size": 8}),
          "dinov2": T.Dinov2Config(**VISION | {"image_size": 8, "mlp_ratio": 2})}
LLMS = {"llama": T.LlamaConfig(**TEXT), "qwen2": T.Qwen2Config(**TEXT), "qwen3": T.Qwen3Config(**TEXT),
            "mistral": T.MistralConfig(**TEXT, sliding_window=5)}
PAIRS = [("siglip", "qwen2"), ("siglip", "mistral"), ("dinov2", "llama"), ("dinov2", "qwen3")]
GROUPS = [[example(1, images=0)], EXAMPLES]    # without an image; ragged, with none, one and three


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request, tmp_path_factory, bytes_folder):
    """-> theirs and ours, in float64"""
    tower, llm = request.param
    at = tmp_path_factory.mktemp("pair")
    model = random(T.LlavaForConditionalGeneration(T.LlavaConfig(
        vision_config=TOWERS[tower], text_config=LLMS[llm], image_token_index=3, image_seq_length=4,
        attn_implementation="sdpa", vision_feature_select_strategy="full" if tower == "siglip" else "default")))
    model.save_pretrained(at)
    return model.double(), llava.load_model(init=add_files(at, bytes_folder, PRE), dtype=torch.float64)[0]


@torch.no_grad()
def test_logits_and_answers_are_those_of_transformers(pair):
    theirs, mine = pair
    single = copy.deepcopy(theirs).float(), copy.deepcopy(mine).float()
    low = copy.deepcopy(theirs).bfloat16(), copy.deepcopy(mine).bfloat16()
    double = exact_norms(theirs)
    chosen = []
    for examples in GROUPS:
        true = their_logits(double, examples, mine.cfg.vision)
        assert (all_logits(mine, pack(examples, 8)) - true).abs().max() <= PARITY * max(1, true.abs().max())
        true = their_logits(single[0], examples, mine.cfg.vision, torch.float32)
        assert true.std() > 0.1
        assert (all_logits(single[1], pack(examples, 8)) - true).abs().max() <= 1e-5 * max(1, true.abs().max())
        n = max(len(ids) for ids, _, _ in examples)
        ids = torch.tensor([[0] * (n - len(ids)) + ids for ids, _, _ in examples])                # padded on the left
        mask = torch.arange(n, 0, -1) <= torch.tensor([len(ids) for ids, _, _ in examples])[:, None]
        images = torch.cat([i for _, _, i in examples])
        seen = {"pixel_values": pixels(images, mine.cfg.vision).double()} if len(images) else {}
        out = double.generate(input_ids=ids, attention_mask=mask.long(), **seen, max_new_tokens=6, do_sample=False,
                              suppress_tokens=[3], eos_token_id=2, pad_token_id=0)
        answers = generate(mine, [torch.tensor(ids) for ids, _, _ in examples], images, {2}, 6)
        assert answers == [(ids + [2])[: (ids + [2]).index(2)] for ids in out[:, n:].tolist()]
        chosen += [i for row in answers for i in row]
    assert len(set(chosen)) > 5
    exact = all_logits(low[1].double(), pack(EXAMPLES, 8))                        # of weights in bf16, the rest exact
    off = [(x.double() - exact).square().mean().sqrt() for x in (
        all_logits(low[1].bfloat16(), pack(EXAMPLES, 8)),
        their_logits(low[0], EXAMPLES, mine.cfg.vision, torch.bfloat16))]
    assert off[0] <= 2 * off[1], off             # two attentions of transformers already differ by a factor of 1.4

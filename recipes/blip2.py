"""BLIP-2 (Li et al. 2023, arXiv 2301.12597), second stage: EVA ViT-g, a Q-Former of 32 queries, OPT 2.7B. Tower and
language model are frozen; the Q-Former, its projection and the tower's last norm train on captions.

Published: under 6 days on 16 A100 for the first stage, under 3 days for the second. The first stage (image-text
contrast, matching, generation: parts/blip2.py) is train_pairs.py. The published Q-Former starts from BERT, the toy's
from nothing.
Toy world, one epoch per stage: 89.1 ± 1.6 % seeing, 31.1 ± 0.4 % blind, 3 seeds (demo/systems.jsonl).

    python train_sft.py recipes/blip2.py --dry_run            # the plan at the size of the paper
    torchrun train_pairs.py recipes/blip2.py --data=toy       # the toy world: first stage, then captions, conversations
    torchrun train_align.py recipes/blip2.py --data=toy --vision=runs/blip2_pairs/model
    torchrun train_sft.py recipes/blip2.py --data=toy
"""

from model import VLMConfig
from parts.eva import EvaConfig
from parts.opt import OptConfig

align = stage == "align"
connector, template, system, init, out = "mlp", "blip", "", "", f"runs/blip2_{stage}"
data, vision, llm = "", "EVA ViT-g", "facebook/opt-2.7b"
train = "multi_modal_projector.*=1e-4 *.post_layernorm.*=1e-4"
batch_size, max_len, max_tokens, steps, warmup = 1920, 128, 4096, 80_000, 0.025
weight_decay = 0.0 if toy else 0.05
paper = dict(
    model=VLMConfig(EvaConfig(), OptConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32,
                                           num_attention_heads=32, num_key_value_heads=32, head_dim=80),
                    "qformer", tokens=32),
    samples=129_000_000, images=1, text=32, supervised=20, hours="under 3 days on 16 A100")
parts = "connector=qformer tokens=32 vision.feature_layer=-1 vision.feature_norm=true vision.keep_class=true"

if toy:
    vision, llm, batch_size, max_len, max_tokens, steps, warmup = "demo/vit", "demo/llm", 16, 512, 4096, 0, 0.03
    epochs, template = (3.0, "plain") if align else (2.0, "vicuna_v1")
    # self-attention of the Q-Former learns slowly: at the rate of the rest it makes all queries equal (docs/systems.md)
    train = "multi_modal_projector.*=2e-3 multi_modal_projector.layers.*.attention.*=2e-4" if align else (
        "multi_modal_projector.*=3e-3 multi_modal_projector.layers.*.attention.*=3e-4 language_model.*=3e-3")
    parts = ("connector=qformer tokens=12 connector_args.hidden_size=64 connector_args.num_hidden_layers=2 "
             "connector_args.num_attention_heads=4 connector_args.intermediate_size=256 vision.feature_layer=-1 "
             "vision.feature_norm=true vision.keep_class=true")
if stage == "pairs":                                   # the first stage: no language model
    kind, template, system, llm, train, lr = "blip2", "", None, "", "", 1e-4
    parts, batch_size, steps, warmup, max_len = "tokens=32", 1680, 250_000, 0.02, 512
    if toy:
        parts = ("tokens=12 width=64 qformer.hidden_size=64 qformer.num_hidden_layers=2 qformer.num_attention_heads=4 "
                 "qformer.intermediate_size=256")
        batch_size, steps, epochs, lr = 64, 0, 4.0, 2e-3
elif not align:
    init, vision, llm, parts = "runs/blip2_align", "", "", ""
del align

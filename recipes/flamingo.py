"""Flamingo (Alayrac et al. 2022, arXiv 2204.14198): a frozen tower, a perceiver resampler of 64 latents, a frozen
language model, and new gated cross-attention blocks between its layers. An image is one marker token in the text; a
token sees the last image before it. Gates start at 0, so training starts from the bare language model.

Published for 80B: 15 days on 1536 TPUv4. NFNet and Chinchilla are not public: below are CLIP-L and a Llama of 7B. The
toy's second stage trains the language model, too. The paper adds up gradients of four data sets, with the weights 1.0
(M3W), 0.2 (ALIGN), 0.2 (LTIP) and 0.03 (VTP, videos: not here). Here every step has samples of every file (`order`),
and a file has a share of the samples and then the weight of its loss, as in
--data=m3w.jsonl:.2:1.0,align.json:.4:0.2,ltip.json:.4:0.2 (these shares are ours). M3W is documents, images between the
words. Not here: in half of the paper's samples a text sees the next image, not the last.
Toy world, one epoch per stage: 80.9 ± 6.9 % seeing, 30.4 ± 1.6 % blind, 3 seeds (demo/systems.jsonl).

    python train_sft.py recipes/flamingo.py --dry_run            # the plan at the size of the paper
    torchrun train_align.py recipes/flamingo.py --data=toy       # the toy world: both stages
    torchrun train_sft.py recipes/flamingo.py --data=toy
"""

from model import VisionConfig, VLMConfig
from parts.cross_attention import FlamingoConfig

align = stage == "align"
connector, template, system, init, out = "mlp", "flamingo", "", "", f"runs/flamingo_{stage}"
data, vision, llm = "", "openai/clip-vit-large-patch14", "a 7B language model"
train = "multi_modal_projector.*=1e-4 language_model.gated_layers.*=1e-4"
batch_size, max_len, max_tokens, steps, warmup = 2048, 256, 8192, 500_000, 0.01
weight_decay, order = (0.0, "shuffle") if toy else (0.1, "accumulate_all")
paper = dict(
    model=VLMConfig(VisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                                 image_size=224, patch_size=14, feature_layer=-1, keep_class=True),
                    FlamingoConfig(cross_every=4, cross_width=1024), "perceiver", tokens=1),
    samples=1, images=1, text=64, supervised=64, hours="80B: 15 days on 1536 TPUv4")
parts = ("text.model_type=flamingo text.cross_every=4 text.cross_width=1024 connector=perceiver tokens=1 "
         "vision.feature_layer=-1 vision.keep_class=true")

if toy:
    vision, llm, batch_size, max_len, max_tokens, steps, warmup = "demo/vit", "demo/llm", 16, 512, 4096, 0, 0.03
    epochs, template = (3.0, "plain") if align else (2.0, "vicuna_v1")
    # the gates learn faster than the rest: at its rate they stay nearly closed for the toy's few hundred steps
    train = ("multi_modal_projector.*=2e-3 language_model.gated_layers.*=2e-3 "
             "language_model.gated_layers.*.alpha_*=3e-2")
    if not align:
        train = "multi_modal_projector.*=3e-3 language_model.*=3e-3"
    parts = ("text.model_type=flamingo text.cross_width=128 connector=perceiver tokens=1 connector_args.latents=16 "
             "connector_args.depth=2 connector_args.heads=4 connector_args.head_dim=32 vision.keep_class=true")
if not align:
    init, vision, llm, parts = "runs/flamingo_align", "", "", ""
del align

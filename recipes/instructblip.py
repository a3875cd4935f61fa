"""InstructBLIP (Dai et al. 2023, arXiv 2305.06500): BLIP-2 whose Q-Former also reads the question, so the 32 tokens of
an image depend on what is asked. Tower and language model are frozen; Q-Former and projection train on 13 data sets.

Batch 192 to 64 by size, at most 60,000 steps, about 1.5 days on 16 A100 (unchecked). Not here: the weights of BLIP-2,
so the toy's Q-Former starts from nothing, with a trained language model in its second stage.
Toy world, one epoch per stage: 90.3 ± 0.2 % seeing, 30.2 ± 1.0 % blind, 3 seeds (demo/systems.jsonl).

    python train_sft.py recipes/instructblip.py --dry_run            # the plan at the size of the paper
    torchrun train_align.py recipes/instructblip.py --data=toy       # the toy world: both stages
    torchrun train_sft.py recipes/instructblip.py --data=toy
"""

from model import TextConfig, VLMConfig
from parts.eva import EvaConfig

align = stage == "align"
connector, template, system, init, out = "mlp", "instructblip", "", "", f"runs/instructblip_{stage}"
data, vision, llm = "", "EVA ViT-g", "lmsys/vicuna-7b-v1.1"
train = "multi_modal_projector.*=1e-5"
batch_size, max_len, max_tokens, steps, warmup = 128, 256, 4096, 60_000, 0.017
weight_decay = 0.0 if toy else 0.05
paper = dict(
    model=VLMConfig(EvaConfig(), TextConfig(), "instruct", tokens=32, connector_args={"vocab_size": 30523}),
    samples=1, images=1, text=64, supervised=16, hours="about 1.5 days on 16 A100 (unchecked)")
parts = ("connector=instruct tokens=32 connector_args.vocab_size=30523 vision.feature_layer=-1 "
         "vision.feature_norm=true vision.keep_class=true")

if toy:
    vision, llm, batch_size, max_len, max_tokens, steps, warmup = "demo/vit", "demo/llm", 16, 512, 4096, 0, 0.03
    epochs, template = (3.0, "plain") if align else (2.0, "vicuna_v1")
    # self-attention of the Q-Former learns slowly: at the rate of the rest it makes all queries equal (docs/systems.md)
    train = "multi_modal_projector.*=2e-3 multi_modal_projector.layers.*.attention.*=2e-4" if align else (
        "multi_modal_projector.*=3e-3 multi_modal_projector.layers.*.attention.*=3e-4 language_model.*=3e-3")
    parts = ("connector=instruct tokens=12 connector_args.hidden_size=64 connector_args.num_hidden_layers=2 "
             "connector_args.num_attention_heads=4 connector_args.intermediate_size=256 vision.feature_layer=-1 "
             "vision.feature_norm=true vision.keep_class=true")
if not align:
    init, vision, llm, parts = "runs/instructblip_align", "", "", ""
del align

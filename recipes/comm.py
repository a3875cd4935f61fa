"""COMM (Jiang et al. 2023, arXiv 2310.08825): CLIP and DINOv2 side by side. Of each tower, several layers are mixed
with learned weights; the second tower's mix passes an MLP; both stand side by side on the channels of one linear
layer.

Published: about 100 hours for stage 1 and 20 for stage 2, on 8 A800. The toy takes its one tower twice, from different
layers: it shows that the parts train, not what a second kind of tower adds. The number of steps of stage 2 is ours.
Toy world, one epoch per stage: 97.0 ± 0.6 % seeing, 2.0 ± 3.1 % blind, 3 seeds (demo/systems.jsonl).

    python train_sft.py recipes/comm.py --dry_run            # the plan at the size of the paper
    torchrun train_align.py recipes/comm.py --data=toy       # the toy world: both stages
    torchrun train_sft.py recipes/comm.py --data=toy
"""

from model import TextConfig, VisionConfig, VLMConfig

align = stage == "align"
connector, template, system, init, out = "mlp", "vicuna_v1", "", "", f"runs/comm_{stage}"
data, vision, llm = "", "openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"
train = "multi_modal_projector.*=2e-5 language_model.*=2e-5"
batch_size, max_len, max_tokens, steps, warmup = 64, 2048, 16384, 100_000 if align else 10_000, 0.03
large = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
             patch_size=14)
paper = dict(
    model=VLMConfig(VisionConfig(**large, feature_layer=tuple(range(1, 25))), TextConfig(), "comm",
                    second=VisionConfig("dinov2", **large, hidden_act="gelu", feature_layer=tuple(range(19, 25)))),
    samples=3_600_000, images=1, text=120, supervised=60, hours="about 100 h, then 20 h, on 8 A800")
del large
parts = ("second=facebook/dinov2-large connector=comm second.feature_layer=[19,20,21,22,23,24] "
         f"vision.feature_layer={[*range(1, 25)]}".replace(", ", ","))

if toy:
    vision, llm, batch_size, max_len, max_tokens, steps, warmup = "demo/vit", "demo/llm", 16, 512, 4096, 0, 0.03
    epochs, template = (3.0, "plain") if align else (2.0, "vicuna_v1")
    train = "multi_modal_projector.*=5e-3" if align else "multi_modal_projector.*=3e-3 language_model.*=3e-3"
    parts = "second=demo/vit vision.feature_layer=[1,2,3,4] second.feature_layer=[3,4] connector=comm"
if not align:
    init, vision, llm, parts = "runs/comm_align", "", "", ""
del align

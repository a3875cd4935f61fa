"""LLaVA v1 (Liu et al. 2023, arXiv 2304.08485): CLIP ViT-L/14 at 224 px, one linear layer, Vicuna 7B. Stage 1 trains
the linear layer on 595k captions, stage 2 also the language model on 158k conversations.
Toy world, one epoch per stage: 96.1 ± 1.1 % seeing, 4.2 ± 2.8 % blind, 3 seeds (demo/systems.jsonl).

    python train_sft.py recipes/llava.py --dry_run                     # the plan at the size of the paper
    torchrun train_align.py recipes/llava.py --data=toy                # the toy world: both stages
    torchrun train_sft.py recipes/llava.py --data=toy

Published: less than 4 hours for stage 1, less than 10 for stage 2, on 8 A100. Not here: the paper puts the image before
or after the first question at random; this recipe puts it in front, as the released code does.
"""

from model import TextConfig, VisionConfig, VLMConfig

align = stage == "align"
connector, template, system = "linear", "plain" if align else "llava_v0", None
train = "multi_modal_projector.*=2e-3" if align else "multi_modal_projector.*=2e-5 language_model.*=2e-5"
data, vision, llm = "", "openai/clip-vit-large-patch14", "lmsys/vicuna-7b-v1.1"
init, out, image_aspect = "" if align else "runs/llava_align", f"runs/llava_{stage}", "crop"
batch_size, max_len, max_tokens, epochs, warmup = 128 if align else 32, 2048, 16384, 1.0 if align else 3.0, 0.03
paper = dict(
    model=VLMConfig(VisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                                 image_size=224, patch_size=14), TextConfig(), "linear"),
    samples=595_000 if align else 158_000, images=1, text=30 if align else 400, supervised=18 if align else 250,
    hours="under 4 h" if align else "under 10 h")

if toy:
    vision, llm, system, image_aspect, batch_size, max_len, max_tokens = "demo/vit", "demo/llm", "", "", 16, 512, 4096
    train = "multi_modal_projector.*=5e-3" if align else "multi_modal_projector.*=3e-3 language_model.*=3e-3"
    epochs, template = (3.0, "plain") if align else (2.0, "vicuna_v1")
if not align:
    vision, llm = "", ""
del align

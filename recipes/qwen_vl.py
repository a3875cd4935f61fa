"""Qwen-VL (Bai et al. 2023, arXiv 2308.12966): OpenCLIP ViT-bigG, a resampler of 256 queries (one cross-attention
layer with 2-D positions), Qwen-7B. Boxes are text, <box>(x1,y1),(x2,y2)</box> with numbers in [0, 1000).

Stages of the paper: 1 trains tower and resampler at 224 px on 1.4 billion pairs; 2 trains everything at 448 px; 3
trains language model and resampler on 350k conversations. Hours are not published.
Toy world, one epoch per stage: 89.3 ± 1.3 % seeing, 28.5 ± 0.5 % blind, 3 seeds (demo/systems.jsonl).

    python train_sft.py recipes/qwen_vl.py --dry_run            # the plan at the size of the paper
    torchrun train_align.py recipes/qwen_vl.py --data=toy       # the toy world: both stages
    torchrun train_sft.py recipes/qwen_vl.py --data=toy
    torchrun train_sft.py recipes/qwen_vl.py --data=FILE --parts="vision.image_size=448" --train="*=1e-5"      # stage 2
"""

from model import TextConfig, VLMConfig
from parts.qwen_vit import QwenViTConfig

align = stage == "align"
connector, template, system, init, out = "mlp", "chatml", "", "", f"runs/qwen_vl_{stage}"
data, vision, llm = "", "OpenCLIP ViT-bigG/14", "Qwen/Qwen-7B"
train = "vision_tower.*=2e-4 multi_modal_projector.*=2e-4"
if not align:
    train = "multi_modal_projector.*=1e-5 language_model.*=1e-5"
batch_size, steps, warmup = (30_720, 50_000, 0.01) if align else (128, 8_000, 0.375)
max_len, max_tokens = 2048, 4096
weight_decay = 0.0 if toy else 0.05
paper = dict(
    model=VLMConfig(QwenViTConfig(image_size=224 if align else 448), TextConfig(vocab_size=151936), "resampler",
                    tokens=256),
    samples=1, images=1, text=32 if align else 256, supervised=24 if align else 128, hours="not published")
parts = "connector=resampler tokens=256"

if toy:
    vision, llm, batch_size, max_len, max_tokens, steps, warmup = "demo/vit", "demo/llm", 16, 512, 4096, 0, 0.03
    epochs, template = (3.0, "plain") if align else (2.0, "vicuna_v1")
    train = "multi_modal_projector.*=5e-3" if align else "multi_modal_projector.*=3e-3 language_model.*=3e-3"
    parts = "connector=resampler tokens=16 connector_args.heads=4"
if not align:
    init, vision, llm, parts = "runs/qwen_vl_align", "", "", ""
del align

"""InternVL 1.5 (Chen et al. 2024, arXiv 2404.16821): InternViT-6B, pixel shuffle (2 x 2 patches become one token), an
MLP, a language model of 20 billion. An image is cut into up to 12 tiles of 448 px, then a thumbnail follows.

Stage 1 trains tower and MLP, stage 2 everything; the paper used 256 GPUs and gives no hours. InternLM2 is here a Llama
of its size. On the toy world's images of 72 px there is one tile; layout.most=4 would matter for larger ones. The
number of samples is ours.
Toy world, one epoch per stage: 93.1 ± 1.6 % seeing, 22.6 ± 1.5 % blind, 3 seeds (demo/systems.jsonl).
Toy world, this length: 97.8 % seeing, 9.0 % blind, 1 seed (demo/systems.jsonl).

    python train_sft.py recipes/internvl15.py --dry_run            # the plan at the size of the paper
    torchrun train_align.py recipes/internvl15.py --data=toy       # the toy world: both stages
    torchrun train_sft.py recipes/internvl15.py --data=toy
"""

from model import TextConfig, VLMConfig
from parts.internvit import InternViTConfig

align = stage == "align"
connector, template, system, init, out = "mlp", "chatml", "", "", f"runs/internvl15_{stage}"
data, vision, llm = "", "OpenGVLab/InternViT-6B-448px-V1-5", "internlm/internlm2-chat-20b"
train = "vision_tower.*=1e-5 multi_modal_projector.*=1e-5" if align else "*=2e-5"
batch_size, max_len, max_tokens, epochs, warmup = 2048 if align else 1024, 4096, 8192, 1.0, 0.03
weight_decay = 0.0 if toy else 0.05
paper = dict(
    model=VLMConfig(InternViTConfig(hidden_size=3200, intermediate_size=12800, num_hidden_layers=45,
                                    num_attention_heads=25, use_qk_norm=True, norm_type="rms_norm"),
                    TextConfig(vocab_size=92553, hidden_size=6144, intermediate_size=16384, num_hidden_layers=48,
                               num_attention_heads=48, num_key_value_heads=8), "shuffle", tokens=256),
    samples=5_000_000, images=7, text=300, supervised=150, hours="not published (256 GPUs)")
parts = 'connector=shuffle tokens=256 vision.feature_layer=-1 layout={"kind":"grid","most":12}'

if toy:
    vision, llm, batch_size, max_len, max_tokens, warmup = "demo/vit", "demo/llm", 16, 512, 4096, 0.03
    epochs, template = (3.0, "plain") if align else (2.0, "vicuna_v1")
    train = "multi_modal_projector.*=5e-3" if align else "multi_modal_projector.*=3e-3 language_model.*=3e-3"
    parts = 'connector=shuffle tokens=9 vision.feature_layer=-1 layout={"kind":"grid","most":4}'
if not align:
    init, vision, llm, parts = "runs/internvl15_align", "", "", ""
del align

"""Fuyu-8B (Adept 2023, adept.ai/blog/fuyu-8b; compared in arXiv 2407.07726): no vision tower. One linear layer turns
each patch of 30 x 30 pixels into a token, and a newline token ends each row of patches. Images keep their size.

No training details are published: batch, learning rate and data here are ours. The toy has patches of 24 px and
trains everything in both stages. A row of patches ends in a token of the text, because the vocabulary has no other.
Toy world, one epoch per stage: 40.1 ± 2.2 % seeing, 32.2 ± 0.8 % blind, 3 seeds (demo/systems.jsonl).
Toy world, this length: 75.2 % seeing, 28.1 % blind, 1 seed (demo/systems.jsonl).

    python train_sft.py recipes/fuyu.py --dry_run            # the plan at the size of the paper
    torchrun train_align.py recipes/fuyu.py --data=toy       # the toy world: both stages
    torchrun train_sft.py recipes/fuyu.py --data=toy
"""

from model import VLMConfig
from parts.patches import PatchesConfig
from parts.persimmon import PersimmonConfig

align = stage == "align"
connector, template, system, init, out = "mlp", "fuyu", "", "", f"runs/fuyu_{stage}"
data, vision, llm = "", "none", "adept/persimmon-8b-base"
train = "multi_modal_projector.*=1e-3" if align else "*=1e-5"
batch_size, max_len, max_tokens, epochs, warmup = 128, 4096, 16384, 1.0, 0.03
paper = dict(
    model=VLMConfig(PatchesConfig(), PersimmonConfig(), "patches", tokens=1,
                    layout={"kind": "rows", "row_end": (71019,)}),
    samples=1_000_000, images=300, text=120, supervised=60, hours="not published")
parts = ("connector=patches tokens=1 vision.model_type=patches vision.image_size=30 vision.patch_size=30 "
         'vision.hidden_size=2700 vision.feature_layer=0 layout={"kind":"rows","row_end":[71019]}')

if toy:
    vision, llm, batch_size, max_len, max_tokens, warmup = "demo/vit", "demo/llm", 16, 512, 4096, 0.03
    epochs, template = (6.0, "plain") if align else (8.0, "vicuna_v1")       # it has no tower that sees already
    train = "*=2e-3"
    parts = ("connector=patches tokens=1 vision.model_type=patches vision.image_size=24 vision.patch_size=24 "
             'vision.hidden_size=1728 vision.feature_layer=0 layout={"kind":"rows","row_end":[4]}')
if not align:
    init, vision, llm, parts = "runs/fuyu_align", "", "", ""
del align

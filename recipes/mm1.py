"""MM1 (McKinzie et al. 2024, arXiv 2403.09611): a CLIP ViT-H at 378 px, a C-Abstractor to 144 tokens, a language model
of 3, 7 or 30 billion. Everything trains, on 45 % captions, 45 % interleaved documents and 10 % text, as rows of
formats/rows.py: --data=captions.json:.45,documents.jsonl:.45,text.jsonl:.1

The paper's batches are 512 x 4096 tokens for 200,000 steps. Not here: mixtures of experts, Apple's data and weights.
Connectors to compare: connector=pool (averages), abstractor, resampler (attention), with the same number of tokens.
Not here either: AdaFactor, and the 2 x 2 tiles of the paper's fine-tuning. The toy's first stage trains the connector
alone.
Toy world, one epoch per stage: 85.7 ± 3.4 % seeing, 26.2 ± 1.1 % blind, 3 seeds (demo/systems.jsonl).

    python train_sft.py recipes/mm1.py --dry_run            # the plan at the size of the paper
    torchrun train_align.py recipes/mm1.py --data=toy       # the toy world: both stages
    torchrun train_sft.py recipes/mm1.py --data=toy
"""

from model import TextConfig, VisionConfig, VLMConfig

align = stage == "align"
connector, template, system, init, out = "mlp", "vicuna_v1", "", "", f"runs/mm1_{stage}"
data, vision, llm = "", "apple/DFN5B-CLIP-ViT-H-14-378", "a 3B language model"
train = "*=6e-5" if align else "*=1e-5"
batch_size, max_len, max_tokens, steps, warmup = 4096, 4096, 4096, 200_000 if align else 10_000, 0.01
paper = dict(
    model=VLMConfig(VisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                                 image_size=378, patch_size=14, hidden_act="gelu", feature_layer=-1),
                    TextConfig(vocab_size=100352, hidden_size=2560, intermediate_size=6912, num_hidden_layers=32,
                               num_attention_heads=20, num_key_value_heads=20), "abstractor", tokens=144,
                    connector_args={"width": 1280}),
    samples=1, images=1, text=368, supervised=368, hours="not published")
parts = "connector=abstractor tokens=144 connector_args.width=1280 vision.feature_layer=-1"

if toy:
    vision, llm, batch_size, max_len, max_tokens, steps, warmup = "demo/vit", "demo/llm", 16, 512, 4096, 0, 0.03
    epochs, template = (3.0, "plain") if align else (2.0, "vicuna_v1")
    train = "multi_modal_projector.*=5e-3" if align else "multi_modal_projector.*=3e-3 language_model.*=3e-3"
    parts = "connector=abstractor tokens=9 connector_args.width=64 vision.feature_layer=-1"
if not align:
    init, vision, llm, parts = "runs/mm1_align", "", "", ""
del align

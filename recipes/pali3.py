"""PaLI-3 (Chen et al. 2023, arXiv 2310.09199), an analogue: SigLIP ViT-G/14, a linear layer, and a language model that
sees image and question as a prefix. The paper's language model is UL2, an encoder and a decoder of 3 billion weights
together; here it is a Llama of that size. The sizes of both towers are not published in full; those below are ours.
Toy world, one epoch per stage: 93.9 ± 2.5 % seeing, 9.7 ± 10.7 % blind, 3 seeds (demo/systems.jsonl).
Toy world, this length: 97.0 % seeing, 0.5 % blind, 1 seed (demo/systems.jsonl).

    python train_sft.py recipes/pali3.py --dry_run                     # the plan at the size of the paper
    torchrun train_align.py recipes/pali3.py --data=toy                # the toy world: both stages
    torchrun train_sft.py recipes/pali3.py --data=toy
    torchrun train_sft.py recipes/pali3.py --data=FILE --parts="vision.image_size=812" --max_len=4096   # at 812 px

Stages of the paper: the language model trains with a frozen tower at 224 px; then everything at 812 and 1064 px; then
the language model on each task. Batch sizes and learning rates are not published; those here are ours.
"""

from model import TextConfig, VisionConfig, VLMConfig

connector, template, system = "linear", "paligemma", ""
train = "multi_modal_projector.*=1e-4 language_model.*=1e-4"
data, vision, llm, init, out = "", "SigLIP-G", "UL2-like Llama", "", f"runs/pali3_{stage}"
batch_size, max_len, max_tokens, epochs, warmup = 256, 1024, 16384, 1.0, 0.03
parts = "mask=prefix vision.feature_layer=-1 vision.feature_norm=true"
paper = dict(
    model=VLMConfig(VisionConfig("siglip_vision_model", 1664, 8192, 48, 16, 224, 14, "gelu_pytorch_tanh", 1e-6,
                                 feature_layer=-1, feature_norm=True),
                    TextConfig(vocab_size=250112, hidden_size=2048, intermediate_size=5632, num_hidden_layers=44,
                               num_attention_heads=16, num_key_value_heads=16), "linear", mask="prefix"),
    samples=1_000_000_000, images=1, text=64, supervised=32, hours="not published")

if toy:
    vision, llm, batch_size, max_len, max_tokens = "demo/vit", "demo/llm", 16, 512, 4096
    epochs = 3.0 if stage == "align" else 2.0
    train = "multi_modal_projector.*=5e-3" if stage == "align" else "multi_modal_projector.*=3e-3 language_model.*=3e-3"
    template = "plain" if stage == "align" else "paligemma"
if stage == "sft":
    init, vision, llm, parts = "runs/pali3_align", "", "", ""

"""DeepSpeed-VisualChat (Yao et al. 2023, arXiv 2309.14327): multi-modal causal attention. Text attends to text and to
images by two attentions whose results are added; an image token sees itself alone. The language model's blocks stay
frozen: the linear layer with its norm and the token embeddings train (the head does not).

Up to 8 images in a conversation. Hours are not published. The script it released feeds CLIP-L with its class token.
The toy's second stage trains the whole language model.
Toy world, one epoch per stage: 97.2 ± 0.2 % seeing, 0.0 ± 0.0 % blind, 3 seeds (demo/systems.jsonl).

    python train_sft.py recipes/visualchat.py --dry_run            # the plan at the size of the paper
    torchrun train_align.py recipes/visualchat.py --data=toy       # the toy world: both stages
    torchrun train_sft.py recipes/visualchat.py --data=toy
"""

from model import TextConfig, VisionConfig, VLMConfig

align = stage == "align"
connector, template, system, init, out = "mlp", "visualchat", "", "", f"runs/visualchat_{stage}"
data, vision, llm = "", "openai/clip-vit-large-patch14", "meta-llama/Llama-2-7b-hf"
train = "multi_modal_projector.*=1e-3 language_model.model.embed_tokens.*=1e-3"
batch_size, max_len, max_tokens, epochs, warmup = 128, 4096, 16384, 6.0, 0.1
paper = dict(
    model=VLMConfig(VisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                                 image_size=224, patch_size=14, feature_layer=-1, keep_class=True), TextConfig(),
                    "linear_norm", tokens=257, mask="mmca"),
    samples=300_000, images=2, text=300, supervised=150, hours="not published")
parts = "mask=mmca connector=linear_norm tokens=257 vision.feature_layer=-1 vision.keep_class=true"

if toy:
    vision, llm, batch_size, max_len, max_tokens, warmup = "demo/vit", "demo/llm", 16, 512, 4096, 0.03
    epochs, template = (3.0, "plain") if align else (2.0, "vicuna_v1")
    train = "multi_modal_projector.*=5e-3" if align else "multi_modal_projector.*=3e-3 language_model.*=3e-3"
    parts = "mask=mmca connector=linear_norm tokens=37 vision.feature_layer=-1 vision.keep_class=true"
if not align:
    init, vision, llm, parts = "runs/visualchat_align", "", "", ""
del align

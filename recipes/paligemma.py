"""PaliGemma (Beyer et al. 2024, arXiv 2407.07726): SigLIP-So400m, one linear layer, Gemma 2B. Image and question see
each other (prefix-LM), and only the answer is supervised. Each example counts 1 in the loss, however long its answer is
(loss=sample; so in the paper's code, big_vision). Every weight trains, from the first stage on.
Toy world, one epoch per stage: 91.3 ± 2.5 % seeing, 14.6 ± 7.5 % blind, 3 seeds (demo/systems.jsonl).
Toy world, this length: 97.8 % seeing, 0.0 % blind, 1 seed (demo/systems.jsonl).

    python train_sft.py recipes/paligemma.py --dry_run                      # the plan at the size of the paper
    torchrun train_align.py recipes/paligemma.py --data=toy                 # the toy world: both stages
    torchrun train_sft.py recipes/paligemma.py --data=toy
    torchrun train_sft.py recipes/paligemma.py --data=FILE --parts="vision.image_size=448" --max_len=1536  # at 448 px

On the toy world the parts are small: its CLIP-like tower with the last norm, its Llama with a prefix mask. The stages
of the paper: 1 billion samples at 224 px (text 128), then 50 million at 448 px and 10 million at 896 px. Not here:
Google's data, the reciprocal square root schedule, the slow warm-up of SigLIP's rate.
Batch, rate and warm-up are those of the paper's transfer to tasks. The toy's first stage trains the connector alone.
"""

from model import VisionConfig, VLMConfig
from parts.gemma import GemmaConfig

template, system, connector, loss = "paligemma", "", "linear", "sample"
train = "vision_tower.*=1e-5 multi_modal_projector.*=1e-5 language_model.*=1e-5"
data, vision, llm = "", "google/siglip-so400m-patch14-224", "google/gemma-2b"
init, out = "", f"runs/paligemma_{stage}"
batch_size, max_len, max_tokens, epochs, warmup = 256, 512, 16384, 1.0, 0.05
paper = dict(
    model=VLMConfig(VisionConfig("siglip_vision_model", 1152, 4304, 27, 16, 224, 14, "gelu_pytorch_tanh", 1e-6,
                                 feature_layer=-1, feature_norm=True),
                    GemmaConfig(vocab_size=257216, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
                                num_attention_heads=8, num_key_value_heads=1, first_position=1),
                    "linear", 257152, mask="prefix"),
    samples=1_000_000_000, images=1, text=64, supervised=32, hours="stage 1: under 3 days on 256 TPUv5e")
parts = "mask=prefix vision.feature_layer=-1 vision.feature_norm=true text.first_position=1"

if toy:
    vision, llm, batch_size, max_len, max_tokens, warmup = "demo/vit", "demo/llm", 16, 512, 4096, 0.03
    train = "multi_modal_projector.*=5e-3" if stage == "align" else "multi_modal_projector.*=3e-3 language_model.*=3e-3"
    epochs = 3.0 if stage == "align" else 2.0
    template = "plain" if stage == "align" else "paligemma"
if stage == "sft":
    init, vision, llm, parts = "runs/paligemma_align", "", "", ""

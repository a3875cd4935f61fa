"""Folders of InstructBLIP (arXiv 2305.06500): a BLIP-2 whose Q-Former reads the instruction, with its own tokenizer."""

from config import stop
from formats import blip2
from formats.family import Family
from parts.instruct import InstructConfig

PUBLISHED = {"vocab_size": 30522}              # the default of transformers' class
LAYER = r"^multi_modal_projector\.layers\.(\d+)\."
WORDS = [(r"^multi_modal_projector\.norm", "qformer.embeddings.layernorm"),
         (r"^multi_modal_projector\.(word|position)_embedding", r"qformer.embeddings.\1_embeddings"),
         (rf"{LAYER}word_fc1", r"qformer.encoder.layer.\1.intermediate.dense"),
         (rf"{LAYER}word_fc2", r"qformer.encoder.layer.\1.output.dense"),
         (rf"{LAYER}word_norm", r"qformer.encoder.layer.\1.output.LayerNorm")]


def instructblip_config(c, pre):
    c = c | {"qformer_config": PUBLISHED | (c.get("qformer_config") or {})}
    return blip2.blip2_config(c, pre, "InstructBLIP", "instruct", InstructConfig)


def instructblip_fits(cfg):
    return blip2.blip2_fits(cfg, "instruct") and cfg.connector_args["vocab_size"] > 0


def instructblip_names(cfg):
    return WORDS + blip2.blip2_names(cfg)


def instructblip_files(folder, cfg):
    if not folder.words:
        stop("InstructBLIP's Q-Former has a tokenizer of its own: the folder qformer_tokenizer is missing")
    out = blip2.blip2_files(folder, cfg)
    c = out["config.json"]
    c |= {"architectures": ["InstructBlipForConditionalGeneration"], "model_type": "instructblip"}
    c["vision_config"]["model_type"], c["qformer_config"]["model_type"] = (
        "instructblip_vision_model", "instructblip_qformer")
    for file in ("preprocessor_config.json", "processor_config.json"):
        out[file]["processor_class"] = "InstructBlipProcessor"
    return out


def instructblip_read(tensors, cfg):
    """Old files hold a table of the numbers 0, 1, 2 ..."""
    return {k: x for k, x in tensors.items() if k != "qformer.embeddings.position_ids"}


INSTRUCTBLIP = Family("instructblip", "instructblip", instructblip_config, instructblip_fits,
                      instructblip_names, instructblip_files, instructblip_read)

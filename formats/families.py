"""Families of published models beside LLaVA. Each has its own folder format, which we read and write."""

from formats.blip2 import BLIP2
from formats.fuyu import FUYU
from formats.idefics import IDEFICS
from formats.idefics3 import IDEFICS3, SMOLVLM
from formats.instructblip import INSTRUCTBLIP
from formats.internvl import INTERNVL
from formats.llava_next import LLAVA_NEXT
from formats.paligemma import PALIGEMMA
from formats.pumice import PUMICE
from formats.vipllava import VIPLLAVA
from model import TextConfig, VisionConfig

# PUMICE, the last, fits all
FAMILIES = {family.model_type: family for family in
            (PALIGEMMA, BLIP2, INSTRUCTBLIP, INTERNVL, FUYU, VIPLLAVA, LLAVA_NEXT, IDEFICS, IDEFICS3,
             SMOLVLM, PUMICE)}


def is_llava(cfg):
    """VLMConfig -> can transformers' LLaVA hold such a model?"""
    v = cfg.vision
    return (type(cfg.text) is TextConfig and type(v) is VisionConfig and cfg.mask == "causal"
            and cfg.connector in ("linear", "mlp") and not (cfg.tokens or cfg.layout or cfg.second)
            and isinstance(v.feature_layer, int) and not (v.feature_norm or v.keep_class or cfg.text.first_position))


def family_of(cfg):
    """VLMConfig -> the Family in whose format its folder is written; None: in LLaVA's format"""
    return None if is_llava(cfg) else next(f for f in FAMILIES.values() if f.fits(cfg))

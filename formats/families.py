"""The families of published models that folders are read from and written as, beside LLaVA itself."""

from formats.paligemma import PALIGEMMA

FAMILIES = {family.model_type: family for family in (PALIGEMMA,)}


def is_llava(cfg):
    """VLMConfig -> can transformers' LLaVA hold such a model?"""
    v = cfg.vision
    return (cfg.mask == "causal" and cfg.connector in ("linear", "mlp") and not (cfg.tokens or cfg.layout or cfg.second)
            and isinstance(v.feature_layer, int) and not (v.feature_norm or v.keep_class or cfg.text.first_position))


def family_of(cfg):
    """VLMConfig -> the Family as which a folder is written; None: LLaVA"""
    return None if is_llava(cfg) else next(f for f in FAMILIES.values() if f.fits(cfg))

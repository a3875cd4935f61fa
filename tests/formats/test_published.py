"""Published models of other families at full size, on the meta device: names and shapes of all tensors are those of
transformers' classes. The configs leave out what is a default of these classes, so that our defaults are needed, too.
Fuyu and InternVL: test_families_tiles.py; LlavaNext, Idefics3, SmolVLM: test_families_next.py."""

import copy

import pytest
import torch

from formats.families import FAMILIES
from formats.family import write_names
from formats.names import rename
from parts.build import build

T = pytest.importorskip("transformers")
CONFIGS = {  # name in transformers -> config.json; sizes as those of paligemma-3b-pt-224, blip2-opt-2.7b,
    "PaliGemmaForConditionalGeneration": {                           # instructblip-vicuna-7b, idefics-9b, vip-llava-7b
        "model_type": "paligemma", "hidden_size": 2048, "image_token_index": 257152, "projection_dim": 2048,
        "text_config": {"hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma",
                        "num_attention_heads": 8, "num_hidden_layers": 18, "num_image_tokens": 256,
                        "num_key_value_heads": 1, "torch_dtype": "float32", "vocab_size": 257216},
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                          "num_attention_heads": 16, "num_hidden_layers": 27, "num_image_tokens": 256, "patch_size": 14,
                          "projection_dim": 2048, "projector_hidden_act": "gelu_fast", "vision_use_head": False}},
    "Blip2ForConditionalGeneration": {
        "model_type": "blip-2", "image_token_index": 50265, "num_query_tokens": 32, "vision_config": {"dropout": 0.0},
        "qformer_config": {"vocab_size": 30523}, "use_decoder_only_language_model": True,
        "text_config": {"model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
                        "num_attention_heads": 32, "word_embed_proj_dim": 2560, "vocab_size": 50304}},
    "InstructBlipForConditionalGeneration": {
        "model_type": "instructblip", "image_token_index": 32000, "num_query_tokens": 32, "vision_config": {},
        "qformer_config": {"vocab_size": 30523},
        "text_config": {"model_type": "llama", "vocab_size": 32002, "rms_norm_eps": 1e-6}},
    "IdeficsForVisionText2Text": {
        "model_type": "idefics", "additional_vocab_size": 2, "alpha_initializer": "zeros", "alpha_type": "float",
        "cross_layer_interval": 4, "hidden_size": 4096, "intermediate_size": 11008, "max_sequence_length": 2048,
        "num_attention_heads": 32, "num_hidden_layers": 32, "qk_layer_norms": True, "use_resampler": True,
        "vocab_size": 32000, "tie_word_embeddings": False,
        "perceiver_config": {"qk_layer_norms_perceiver": True, "resampler_depth": 6, "resampler_head_dim": 96,
                             "resampler_n_heads": 16, "resampler_n_latents": 64, "use_resampler": True},
        "vision_config": {"embed_dim": 1280, "hidden_act": "gelu", "image_size": 224, "intermediate_size": 5120,
                          "num_attention_heads": 16, "num_hidden_layers": 32, "patch_size": 14}},
    "VipLlavaForConditionalGeneration": {
        "model_type": "vipllava", "image_token_index": 32000, "projector_hidden_act": "gelu",
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336,
                          "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
                          "patch_size": 14, "projection_dim": 768},
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                        "vocab_size": 32064}}}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_published_name_is_known(name):
    c = CONFIGS[name]
    family = FAMILIES[c["model_type"]]
    cfg = family.config(copy.deepcopy(c), {})
    assert family.fits(cfg)
    with torch.device("meta"):
        theirs = getattr(T, name)(getattr(T, name.split("For")[0] + "Config")(**copy.deepcopy(c))).state_dict()
        state = build(cfg).state_dict()
        ours = {rename(n): x.shape for n, x in family.write(write_names(state, family.names(cfg)), cfg).items()}
    theirs = {rename(n): x.shape for n, x in theirs.items()}
    left = {n for n in theirs.keys() - ours.keys() if ".layers.23." not in n}    # VipLlava reads 23 of 24 blocks
    assert left == ({"language_model.lm_head.weight"} if cfg.text.tie_word_embeddings else set())
    assert ours.items() <= theirs.items()

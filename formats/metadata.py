"""The files of a published LLaVA folder except the weights: configs, tokenizer, chat template, image processor. All
versions of transformers since 4.46 read the same settings from them."""

import chat
from formats.configs import TEXT, image_spec, positions, strategy
from formats.jinja import JINJA, jinja

# image_aspect -> settings for transformers' image processor. S: side of the image; short: shorter side before a crop
PROCESSORS = {
    "pad": lambda S, short: {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": True,
                             "size": {"shortest_edge": S}, "crop_size": {"height": S, "width": S}},
    "crop": lambda S, short: {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True,
                              "size": {"shortest_edge": short}, "crop_size": {"height": S, "width": S}},
    "squash": lambda S, short: {"image_processor_type": "SiglipImageProcessor", "do_center_crop": False,
                                "size": {"height": S, "width": S}, "crop_size": None}}
SIZES = "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads "


def tokenizer_files(tok, template, system, length):
    """-> {file name: content}. length: how many tokens the LLM can read. eos_token is the token that ends an
    answer, even if the base model has another EOS, because programs stop generation at tokenizer.eos_token_id."""
    names = {i: name for name, i in tok.specials.items()}
    talk = jinja(template, system) if template in JINJA else None
    files = {"chat_template.json": {"chat_template": talk}, "chat_template.jinja": talk}     # json: for LlavaProcessor
    return (files if talk else {}) | {
        "tokenizer.json": tok.spec | {"post_processor": None},                # no second BOS: the template writes one
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names.get(tok.bos),
            "eos_token": names.get(chat.end_of_turn(tok, template)), "pad_token": names.get(tok.pad),
            "unk_token": "<unk>" if "<unk>" in tok.specials else None, "model_max_length": length,
            "padding_side": "left", "clean_up_tokenization_spaces": False, "image_token": names[tok.image],
            "model_input_names": ["input_ids", "attention_mask"], "processor_class": "LlavaProcessor",
            **({"chat_template": talk} if talk else {})}}                     # read by transformers before 4.50


def updated(published, cfg, keys):
    """A published config.json -> a copy with the values of cfg for `keys` (one string, names separated by spaces)"""
    kept = {k: x for k, x in published.items() if k not in ("rope_parameters", "dtype", "torch_dtype")}
    return kept | {k: getattr(cfg, k) for k in keys.split()}


def text_part(folder, cfg):
    """-> text_config of config.json"""
    text = updated(folder.text, cfg.text, SIZES + "num_key_value_heads head_dim vocab_size rms_norm_eps rope_theta "
                   "rope_scaling max_position_embeddings tie_word_embeddings")
    return text | {"architectures": [TEXT[cfg.text.model_type]["architecture"]]}


def vision_part(folder, cfg):
    """-> vision_config of config.json"""
    v = cfg.vision
    vision = updated(folder.vision, v, SIZES + "image_size patch_size hidden_act layer_norm_eps") | {"num_channels": 3}
    if not has_later_blocks(folder, cfg):
        vision["num_hidden_layers"] = v.depth
    if v.model_type.startswith("dinov2"):
        vision["mlp_ratio"] = vision.pop("intermediate_size") // v.hidden_size
    if v.model_type == "siglip_vision_model":
        vision["vision_use_head"] = False                                     # the folder has no pooling head
    return vision


def has_later_blocks(folder, cfg):
    """Does the folder hold all blocks of the ViT? The VLM itself has none after the feature layer."""
    return cfg.vision.depth == cfg.vision.num_hidden_layers or any(".encoder." in k for k in folder.unused)


def generation_config(tok, cfg, template):
    return {"generation_config.json": {
        "bos_token_id": tok.bos, "eos_token_id": chat.end_of_turn(tok, template), "pad_token_id": tok.pad,
        "do_sample": False,
        "suppress_tokens": sorted({cfg.image_token_index, *range(len(tok), cfg.text.vocab_size)})}}   # never generated


def metadata(folder, cfg, template, system, aspect, dtype):
    """-> {file name: content} of all files except weights and model card. folder: formats.llava.Folder"""
    v, t, tok = cfg.vision, cfg.text, folder.tok
    pre = {k: x for k, x in folder.pre.items() if k != "do_pad"}
    short = image_spec(folder.pre, aspect).short or v.image_size
    files = tokenizer_files(tok, template, system, positions(t))
    return files | generation_config(tok, cfg, template) | {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "ignore_index": -100,
            "image_token_index": cfg.image_token_index, "image_seq_length": v.patches,
            "projector_hidden_act": "gelu" if cfg.connector == "mlp" else "linear",
            "multimodal_projector_bias": True,
            "vision_feature_layer": v.feature_layer if has_later_blocks(folder, cfg) else -1,
            "vision_feature_select_strategy": strategy(v), "pad_token_id": tok.pad,
            "tie_word_embeddings": t.tie_word_embeddings, "torch_dtype": str(dtype).removeprefix("torch."),
            "text_config": text_part(folder, cfg), "vision_config": vision_part(folder, cfg)},
        "preprocessor_config.json":
            pre | {"processor_class": "LlavaProcessor"} | PROCESSORS[aspect](v.image_size, short),
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "patch_size": v.patch_size,
            "image_token": files["tokenizer_config.json"]["image_token"],
            # both keys only count image tokens: patches + 1, and "default" subtracts 1. transformers 4.46 always adds 1
            "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        "pumice.json": {"template": template, "system": system, "image_aspect": aspect}}

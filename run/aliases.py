"""Names of settings in LLaVA's scripts, in transformers' Trainer and in PEFT, for messages about unknown settings."""

ALIASES = {  # name there: name here
    "model_name_or_path": "llm", "data_path": "data", "image_folder": "images", "vision_tower": "vision",
    "output_dir": "out", "pretrain_mm_mlp_adapter": "init", "mm_projector_type": "connector",
    "image_aspect_ratio": "image_aspect", "version": "template", "model_max_length": "max_len", "max_length": "max_len",
    "max_steps": "steps", "num_epochs": "epochs", "num_train_epochs": "epochs", "learning_rate": "lr",
    "mm_projector_lr": "connector_lr", "mm_vision_tower_lr": "vision_lr", "max_grad_norm": "grad_clip",
    "warmup_ratio": "warmup", "warmup_steps": "warmup (a share of the steps)",
    "per_device_train_batch_size": "batch_size (samples per step over all ranks)",
    "gradient_accumulation_steps": "max_tokens (how much one micro-batch may hold)", "lora_enable": "lora_r",
    "lora_rank": "lora_r", "load_in_4bit": "bits", "gradient_checkpointing": "recompute", "bf16": "dtype",
    "dataloader_num_workers": "workers", "num_workers": "workers", "logging_steps": "log_every",
    "eval_steps": "eval_every", "save_steps": "save_every", "save_total_limit": "keep_last",
    "resume_from_checkpoint": "resume"}

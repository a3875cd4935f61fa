"""Published folders in and out: LLaVA and its relatives, tokenizers, PEFT, GGUF, model cards; data rows."""

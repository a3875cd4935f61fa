"""Read and write published model folders. The rest of the repository uses these functions:

    llava.load_model, save_model, aspect     two towers or a LLaVA -> VLM, Folder; a complete llava-hf folder
    peft.save_adapter, load_merged           a LoRA as a PEFT folder; an adapter merged with its base -> VLM, Folder
    configs.image_spec, positions            preprocessor_config.json -> ImageSpec; the longest document of an LLM
    hub.find_folder, find_model              a path or a name of the hub -> a folder on this machine
    tokenizer.Tokenizer, gguf.export         text to ids; files for llama.cpp
    card.text, adapter                       model cards
    rows.Rows                                the samples of a data file
    whole.commit, write_file                 folders and files that are whole or absent
"""

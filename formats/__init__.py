"""Published folders in and out. The rest of the repository enters by these functions:

    llava.load_model(vision, llm, init)      two towers, or a LLaVA -> VLM, Folder
    llava.save_model(out, state, ...)        a complete llava-hf folder that transformers reads
    llava.aspect(folder, cfg)                how a LLaVA folder makes images square
    configs.image_spec(pre, aspect)          preprocessor_config.json -> images.ImageSpec
    configs.positions(cfg)                   the longest document in tokens that an LLM was trained for
    peft.save_adapter(out, state, ...)       a LoRA as a PEFT folder
    peft.load_adapter(model, folder)         wrap a model with a PEFT adapter
    peft.load_merged(folder, dtype)          an adapter, merged with its base -> VLM, Folder
    hub.find_folder(name), find_model(name)  a path or a name of the hub -> a folder on this machine
    tensors.tensor_digest(t), base_digest    digests that tell whether a base has changed
    tokenizer.Tokenizer(folder)              text <-> ids
    card.text(run, cfg), card.adapter        model cards
    gguf.export(folder, out, dtype)          files for llama.cpp
    rows.Rows(file)                          the samples of a data file
    whole.commit(folder, fill), write_file   folders and files that are whole or absent
    strict_json.read_json(path)              a JSON object, without what Python forgives
"""

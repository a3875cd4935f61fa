"""Read and write published model folders. The rest of the repository uses these functions:

    llava.load_model, save_model, aspect     load a LLaVA; write a llava-hf folder; find a folder's image_aspect
    peft.save_adapter, load_merged           write a LoRA as a PEFT folder; load a base model with a LoRA merged into it
    configs.image_spec, positions            the image preprocessing of a folder; how many tokens an LLM can read
    hub.find_folder, find_model              find a model by its path or by its name on the Hugging Face hub
    tokenizer.Tokenizer, gguf.export         turn text into token ids; write the files for llama.cpp
    card.text, adapter                       write the model card of a model or of an adapter
    image_files.load_image, safe_path        read an image file as an upright RGB image; check its path
    rows.open_mixture, open_rows             read the samples of data files: json, jsonl, parquet, tar
    preferences.preference                   read a row of preference data
    questions.read_questions, answers        read the questions of a benchmark; read answers that exist
    whole.commit, write_file                 write a folder or a file completely or not at all
"""

"""Our GGUF of the language model compared with that of llama.cpp's converter. Not part of CI:

    PYTHONPATH=tests python tests/formats/llama_cpp_converter.py LLAMA_CPP DIR

LLAMA_CPP holds convert_hf_to_gguf.py, DIR is written. PyPI has the converter inside a package: pip download --no-deps
--no-binary :all: llama-cpp-python, folder vendor/llama.cpp.

2026-11-21, llama-cpp-python 0.3.36: ten folders (Llama with and without scaled positions, biases, a tied head, three
heads; Mistral with a window; Qwen2; Qwen3) in f32, f16 and bf16: the same tensors, byte for byte. Keys that differ:

    general.*             the converter adds size_label and quantization_version, and spells the name differently
    tokens, token_type    ours name the padded rows of the embedding, too; <unk> is UNKNOWN, the converter's CONTROL
    scores                without tokenizer.model the converter gives all pieces one score, by which llama.cpp cannot
                          merge; ours come from the merges
    add_bos_token         absent in the converter's: llama.cpp would add a second BOS before the template's
    eot_token_id          the end of a turn in ChatML; absent in the converter's
    chat_template         ours moves llama.cpp's image marker to its place in training (gguf.with_media_marker)
    context_length        of a model with a window, the window: llama.cpp has no window for `llama`
    rope.dimension_count, vocab_size    of Qwen absent in the converter's; ours equal llama.cpp's defaults
The mmproj cannot be compared: of LLaVAs the converter reads Pixtral's vision towers alone.
"""

import subprocess
import sys
from pathlib import Path

import gguf
import torch
from conftest import make_tokenizer  # which also finds this repository's modules
from test_gguf import folder, make_pieces, respecified
from test_llava import configure

from formats import gguf as gguf_export, llava
from formats.tokenizer import Tokenizer

# the converter recognises byte-level tokenizers by a hash of the ids of one text: not one trained here
RUN = """
import runpy, sys
sys.path[:0] = [sys.argv[1] + "/gguf-py", sys.argv[1]]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
script = sys.argv.pop(1) + "/convert_hf_to_gguf.py"
runpy.run_path(script, run_name="__main__")
"""
KNOWN = ("general.name", "general.quantization_version", "general.size_label", "tokenizer.chat_template",
         *(f"tokenizer.ggml.{k}" for k in ("tokens", "token_type", "scores", "add_bos_token", "add_eos_token",
                                           "add_space_prefix", "eot_token_id", "unknown_token_id")))


def read(path):
    reader = gguf.GGUFReader(path)
    return ({k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")},
            {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors})


def main(llama_cpp, out):
    out.mkdir(parents=True)
    pieces = respecified(make_pieces(out / "pieces")[1], out / "llama", lambda spec: None).folder
    make_tokenizer(out / "qwen")
    for name in ("clip + llama", "siglip", "llama3 rope", "linear rope", "biases", "tied", "mistral with a window",
                 "three heads, one group", "qwen2", "qwen3"):
        at, tok = out / name.replace(" ", "_"), out / "qwen" if "qwen" in name else pieces
        configure(folder(name, at, tok), image_token_index=Tokenizer(tok).image)
        model, source = llava.load_model(init=at)
        template = "chatml" if "qwen" in name else "vicuna_v1"
        llava.save_model(at / "model", model.state_dict(), model.cfg, source, template, "", "pad", torch.float32)
        for dtype in gguf_export.DTYPES:
            theirs = at / f"theirs-{dtype}.gguf"
            how = llama_cpp, at / "model", "--outfile", theirs, "--outtype", dtype
            subprocess.run([sys.executable, "-c", RUN, *how], check=True, stderr=subprocess.DEVNULL)
            (ours, tensors), (keys, true) = read(gguf_export.export(at / "model", at, dtype)[0]), read(theirs)
            assert tensors == true, name
            more = {k for k in ours.keys() | keys.keys() if k not in KNOWN and ours.get(k) != keys.get(k)}
            print(f"{name:24}{dtype:6}{len(true)} tensors are equal; other keys: {sorted(more)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

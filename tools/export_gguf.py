"""Convert a LLaVA folder to the two GGUF files that llama.cpp reads.

    python -m tools.export_gguf DIR [--out=DIR] [--dtype=f16]     # -> OUT/model-f16.gguf and OUT/mmproj-model-f16.gguf
"""

import sys
from dataclasses import dataclass

from config import one_line_errors, stop
from formats.gguf import export
from run.arguments import parse


@dataclass
class Export:
    out: str = ""          # folder for the two files; "" = DIR/gguf, or name/gguf if DIR is org/name on Hugging Face
    dtype: str = "f16"     # dtype of matrices: f16, bf16, f32; vectors and position embeddings are always f32


def main(argv):
    folders = [a for a in argv if not a.startswith("--")]
    s = parse(Export, [a for a in argv if a.startswith("--")], __doc__)
    if len(folders) != 1:
        stop("usage: python -m tools.export_gguf DIR [--out=DIR] [--dtype=f16]")
    *paths, notes = export(folders[0], s.out, s.dtype)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(*paths, sep="\n")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])

#!/usr/bin/env bash
# Folders of ours in older transformers. Makes an environment per version in DIR, so it needs a network, and is no part
# of CI; PYTHON is one with requirements-test.txt installed. A first run takes some minutes, most of them pip's.
#
#     bash tests/formats/older_transformers.sh DIR [PYTHON]
#
# 2026-11-21, torch 2.13.0, Python 3.11.7; 24 combinations of CLIP, SigLIP or DINOv2 with Llama, Mistral, Qwen2 or Qwen3
# and a connector of one or two layers, a few thousand parameters each, in fp32, fp16 and bf16, half of them in shards:
#     5.23.0   24 of 24: no key missing, unexpected or misshapen, logits equal to 2e-6 of the largest, the same greedy
#     4.57.6   24 of 24: answers, prompt ids, and pixels to 1e-6; the code of the card runs
#     4.46.3   18 of 24, because it has no Qwen3 and says so; of these 4 have padded images, for which it has no image
#              processor and says so too: keys, logits, answers and chat template are equal, pixels are not to be had
set -euo pipefail
at=$(realpath -m "$1") python=${2:-python}
tests=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$at"
"$python" "$tests/clients.py" write "$at/folders"
"$python" "$tests/clients.py" read "$at/folders"
for version in 4.57 4.46; do
    [ -d "$at/$version" ] || "$python" -m venv "$at/$version"
    "$at/$version/bin/pip" install -q torch==2.13.0 "transformers==$version.*" numpy pillow safetensors jinja2
    "$at/$version/bin/python" "$tests/clients.py" read "$at/folders"
done

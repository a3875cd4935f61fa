#!/usr/bin/env bash
# The whole toy world: data, stage 1, stage 2, scores, a page of answers, curves.
# Times: one core of an AMD EPYC (AVX-512), the other busy, November 2026. Scores: README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python                           # where the README installs it
[ -x "$python" ] || python=${PYTHON:-python3}
run="$python -m torch.distributed.run"            # the same as `torchrun`, with this Python

$run train_align.py "$@"                          # 76 s   + 8 s to draw the images: the connector
$python demo/captions.py --model=runs/align       # 5 s    scores of the captions of held-out images
$run train_sft.py "$@"                            # 255 s  + 13 s to draw the images: connector and language model
$python eval.py --model=runs/sft                  # 6 s    held-out questions; writes runs/sft/answers_seeing.jsonl
$python eval.py --model=runs/sft --blind          #        control: image features set to zero
$python eval.py --model=runs/sft --shuffled       #        control: the image of another question
$python -m tools.report runs/sft/answers_seeing.jsonl --images=runs/toy/images   # a page: answers_seeing.html
$python sample.py --model=runs/sft --image=runs/toy/images/test_00000.png --prompt="How many shapes are there?"
$python demo/sheet.py runs/sft/answers_seeing.jsonl runs/answers.png
$python -m tools.plot runs/align runs/sft --out=runs/curves.png || echo "no curves: pip install matplotlib"

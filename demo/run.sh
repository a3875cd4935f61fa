#!/usr/bin/env bash
# From nothing to a model that answers questions about pictures: toy data, stage 1, stage 2, scores, a page and a plot.
# Times were measured on one core of an AMD EPYC (AVX-512) in November 2026, the other being busy; scores: README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python                           # as the README installs it
[ -x "$python" ] || python=${PYTHON:-python3}
run="$python -m torch.distributed.run"            # the same as `torchrun`, from whichever environment python comes

$run train_align.py "$@"                          # 76 s   and 8 s of drawing: the connector learns the language of the model
$python demo/captions.py --model=runs/align       # 5 s    how much of a held-out picture is in its caption
$run train_sft.py "$@"                            # 255 s  and 13 s of drawing: connector and language model learn to converse
$python eval.py --model=runs/sft                  # 6 s    held-out questions; answers_seeing.jsonl and a page beside it
$python eval.py --model=runs/sft --blind          #             what can be guessed without a picture
$python eval.py --model=runs/sft --shuffled       #             what can be guessed from another picture
$python sample.py --model=runs/sft --image=runs/toy/images/test_00000.png --prompt="How many shapes are there?"
$python demo/sheet.py runs/sft/answers_seeing.jsonl runs/answers.png
$python -m tools.plot runs/align runs/sft --out=runs/curves.png || echo "no curves: pip install matplotlib"

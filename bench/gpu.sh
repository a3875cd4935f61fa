#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes and in order of worth: are the kernels right on this card, how fast
# are they, how fast are whole training steps.  bash bench/gpu.sh
# Needs python3 with torch, Triton and pytest; peers that are not installed are named, nothing is downloaded. What was
# found goes to bench/results/<date>-<card>.md after every part. Where OUT names a folder, it holds what each part has
# printed and found at any moment, so that a run which is cut off has told all it knew.
# A copy of the tree without .git is told its revision: REVISION=1a2b3c4 bash bench/gpu.sh
set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/pumice-triton-$UID}   # one for all: tests and Inductor have their own
card=$(python3 -c 'import torch; print(torch.cuda.get_device_name())') || { echo "no GPU that torch can use"; exit 1; }
card=$(echo "${card#NVIDIA }" | tr 'A-Z ' 'a-z-')
page=bench/results/$(date +%F)-$card.md
work=${OUT:-$(mktemp -d)}
[ -n "${OUT:-}" ] || trap 'rm -rf "$work"' EXIT
mkdir -p bench/results "$work"
python3 -c 'import bench; print(bench.machine("cuda"))'

part() {  # name, file, seconds, command ...: what it prints is in file.txt, what it found in file.md and on the page
    local name=$1 file=$work/$2 seconds=$3 began=$SECONDS code=0
    shift 3
    echo "== $name: at most $seconds s"
    timeout -s INT -k 5 "$seconds" "$@" 2>&1 | tee "$file.txt"   # INT: what pytest and Python have found is still said
    code=${PIPESTATUS[0]}
    echo "== $name: exit code $code after $((SECONDS - began)) s"
    [ -s "$file.md" ] || printf '# %s\n\n```\n%s\n```\n' "$name" "$(tail -n 25 "$file.txt" | cut -c1-400)" >"$file.md"
    [ "$code" = 0 ] || printf '\n%s ended with exit code %s (124: its time was over).\n' "$name" "$code" >>"$file.md"
    { [ ! -s "$page" ] || echo; cat "$file.md"; } >>"$page"
    [ "$code" = 0 ] || failed="${failed:-} $name"
}

# Triton compiles on one core, so the tests run side by side; what they compile, the other parts find in Triton's cache
side=(); python3 -c 'import xdist' 2>/dev/null && side=(-n 12 --dist worksteal)
tests=(python3 -m pytest -q -p no:cacheprovider --tb=short --durations=5 "${side[@]}" tests/kernels/test_gpu.py)
kernels=(python3 -m bench kernels --seconds=225 --row_seconds=90 --out="$work/kernels.md")
steps=(python3 -m bench step --rows=S1,S2,S4 --steps=3 --seconds=185 --out="$work/steps.md")
rm -f "$page"
part "Kernels against float64" tests 130 "${tests[@]}"
part "Kernels beside their peers" kernels 240 "${kernels[@]}"
part "Training steps beside transformers" steps 200 "${steps[@]}"
[ -z "${OUT:-}" ] || cp "$page" "$OUT/"
echo "written to $page"
[ -z "${failed:-}" ] || { echo "did not end well:$failed"; exit 1; }

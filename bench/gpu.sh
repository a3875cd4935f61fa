#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes, the most important first: are the kernels right on this card, how
# fast are they, how fast are whole training steps.
#
#     bash bench/gpu.sh                       # needs python3 with torch, Triton and pytest; downloads nothing
#     REVISION=1a2b3c4 bash bench/gpu.sh      # for a copy of the tree without .git
#
# Results go to bench/results/<date>-<card>.md after each part. If OUT names a folder, it also holds the output and the
# page of each part at any moment, so that a run which is cut off loses nothing.
set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/pumice-triton-$UID}   # shared by all parts
card=$(python3 -c 'import torch; print(torch.cuda.get_device_name())') || { echo "no GPU that torch can use"; exit 1; }
card=$(echo "${card#NVIDIA }" | tr 'A-Z ' 'a-z-')
page=bench/results/$(date +%F)-$card.md
work=${OUT:-$(mktemp -d)}
[ -n "${OUT:-}" ] || trap 'rm -rf "$work"' EXIT
mkdir -p bench/results "$work"
python3 -c 'import bench; print(bench.describe_machine("cuda"))'

part() {  # title, file, seconds, command ...: its output goes to file.txt; file.md is its page
    local title=$1 file=$work/$2 seconds=$3 began=$SECONDS code=0
    shift 3
    echo "== $title: at most $seconds s"
    timeout -s INT -k 5 "$seconds" "$@" 2>&1 | tee "$file.txt"   # INT: pytest and Python still report what they have
    code=${PIPESTATUS[0]}
    echo "== $title: exit code $code after $((SECONDS - began)) s"
    [ -s "$file.md" ] || printf '# %s\n\n```\n%s\n```\n' "$title" "$(tail -n 25 "$file.txt" | cut -c1-400)" >"$file.md"
    [ "$code" = 0 ] || printf '\n%s ended with exit code %s (124: out of time).\n' "$title" "$code" >>"$file.md"
    { [ ! -s "$page" ] || echo; cat "$file.md"; } >>"$page"
    [ "$code" = 0 ] || failed="${failed:-} $title"
}

# Triton compiles on one core, so the tests run in parallel; the other parts find their kernels in the cache
parallel=(); python3 -c 'import xdist' 2>/dev/null && parallel=(-n 12 --dist worksteal)
tests=(python3 -m pytest -q -p no:cacheprovider --tb=short --durations=5 "${parallel[@]}" tests/kernels/test_gpu.py)
kernels=(python3 -m bench kernels --seconds=225 --row_seconds=90 --out="$work/kernels.md")
steps=(python3 -m bench step --rows=S1,S2,S4 --steps=3 --seconds=185 --out="$work/steps.md")
rm -f "$page"
part "Kernels against float64" tests 130 "${tests[@]}"
part "Kernels beside their alternatives" kernels 240 "${kernels[@]}"
part "Training steps beside transformers" steps 200 "${steps[@]}"
[ -z "${OUT:-}" ] || cp "$page" "$OUT/"
echo "written to $page"
[ -z "${failed:-}" ] || { echo "failed:$failed"; exit 1; }

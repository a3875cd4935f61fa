#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes and in order of worth: are the kernels right on this card, how fast
# are they, how fast are whole training steps.  bash bench/gpu.sh
# Needs python3 with torch, Triton and pytest; peers that are not installed are named. What was found goes to
# bench/results/<date>-<card>.md after every part, and to $OUT as well where that is set, with all that was printed;
# nothing is downloaded. A copy of the tree without .git is told its revision: REVISION=1a2b3c4 bash bench/gpu.sh
set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
card=$(python3 -c 'import torch; print(torch.cuda.get_device_name())') || { echo "no GPU that torch can use"; exit 1; }
card=$(echo "${card#NVIDIA }" | tr 'A-Z ' 'a-z-')
page=bench/results/$(date +%F)-$card.md
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p bench/results
python3 -c 'import bench; print(bench.machine("cuda"))'

part() {  # name, seconds, command ...: its output here, and what it found on the page, whether it came to an end or not
    local name=$1 seconds=$2 began=$SECONDS code=0
    shift 2
    echo "== $name: at most $seconds s"
    timeout -s INT -k 5 "$seconds" "$@" 2>&1 | tee "$work/log"   # INT: what pytest and Python have found is still said
    code=${PIPESTATUS[0]}
    echo "== $name: exit code $code after $((SECONDS - began)) s"
    {
        if [ -s "$work/page" ]; then cat "$work/page"; else printf '# %s\n\n```\n%s\n```\n' "$name" "$(tail -n 25 "$work/log" | cut -c1-400)"; fi
        [ "$code" = 0 ] || printf '\n%s ended with exit code %s (124: its time was over).\n' "$name" "$code"
        echo
    } >>"$work/all"
    rm -f "$work/page"
    cp "$work/all" "$page"
    if [ -n "${OUT:-}" ]; then cp "$page" "$OUT/"; cp "$work/log" "$OUT/${name// /-}.txt"; fi
    [ "$code" = 0 ] || failed="${failed:-} $name"
}

# Triton compiles on one core, so the tests run side by side; what they compile, the other parts find in Triton's cache
side=(); python3 -c 'import xdist' 2>/dev/null && side=(-n 12 --dist worksteal)
part "Kernels against float64" 130 python3 -m pytest -q -p no:cacheprovider --tb=short --durations=5 "${side[@]}" tests/test_gpu.py
part "Kernels beside their peers" 240 python3 bench.py kernels --seconds=225 --row_seconds=90 --out="$work/page"
part "Training steps beside transformers" 200 python3 bench.py step --rows=S1,S2,S4 --steps=3 --seconds=185 --out="$work/page"
echo "written to $page"
[ -z "${failed:-}" ] || { echo "did not end well:$failed"; exit 1; }

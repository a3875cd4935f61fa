#!/usr/bin/env bash
# Everything that needs a GPU, in nine minutes, the most important first: are the kernels right on this card, which
# tiles are fast, where does the time of a step go, how fast are steps and kernels beside their alternatives.
#
#     bash bench/gpu.sh                       # needs python3 with torch, Triton and pytest; downloads nothing
#     PEERS=DIR bash bench/gpu.sh             # wheels (*.whl) of peers that are not installed: Liger, cut-cross-entropy
#     REVISION=1a2b3c4 bash bench/gpu.sh      # for a copy of the tree without .git
#     bash bench/gpu.sh --dry                 # the same parts on a CPU at toy size, to see that all of them run
#
# Results go to bench/results/<date>-<card>.md after each part; if there is such a page, to <date>-<card>-2.md. If OUT
# names a folder, it also holds the output and the page of each part at any moment, so that a run which is cut off loses
# nothing. No part goes on about 560 s after the start, because a machine may be lent for 600 s.
set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_ALLOC_CONF=expandable_segments:True                     # less memory is lost between tensors
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/pumice-triton-$UID}   # shared by all parts
work=${OUT:-$(mktemp -d)}
[ -n "${OUT:-}" ] || trap 'rm -rf "$work"' EXIT
mkdir -p bench/results "$work"
results=bench/results device=cuda patience=1
if [ "${1:-}" = --dry ]; then
    card=dry results=$work device=cpu patience=10                      # a CPU may be slow
else
    name='import torch; print(torch.cuda.get_device_name())'
    card=$(python3 -c "$name") || { echo "no GPU that torch can use"; exit 1; }
    card=$(echo "${card#NVIDIA }" | tr 'A-Z ' 'a-z-')
fi
page=$results/$(date +%F)-$card.md n=1
while [ -e "$page" ]; do n=$((n + 1)); page=$results/$(date +%F)-$card-$n.md; done      # keep what is there
for wheel in "${PEERS:-/none}"/*.whl; do                               # a wheel is a zip file of what it installs
    [ -f "$wheel" ] && python3 -m zipfile -e "$wheel" "$work/peers"
done
export PYTHONPATH=$work/peers${PYTHONPATH:+:$PYTHONPATH}
python3 -c "import bench; print(bench.describe_machine('$device'))"

part() {  # title, file, seconds, command ...: its output goes to file.txt; file.md is its page
    local title=$1 file=$work/$2 seconds=$(($3 * patience)) left=$((560 * patience - SECONDS)) began=$SECONDS code=0
    [ "$seconds" -le "$left" ] || seconds=$((left > 1 ? left : 1))     # the parts before it took longer
    rm -f "$file.md"
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
tests=(python3 -m pytest -q -p no:cacheprovider --tb=short --durations=5)
large=("${tests[@]}" tests/kernels/test_gpu.py tests/kernels/test_gpu_steps.py -k "beyond or peak")   # one at a time
profile=(python3 -m bench profile --out="$work/profile.md")
tiles=(python3 -m bench tiles --out="$work/tiles.md")
steps=(python3 -m bench step --out="$work/steps.md")
kernels=(python3 -m bench kernels --out="$work/kernels.md")
if [ $device = cpu ]; then
    tests+=(tests/kernels/test_gpu_steps.py)
    tiles+=(--device=cpu --size=tiny --rows=A3 --processes=2 --ms=1)
    profile+=(--device=cpu --rows=S2)
    steps+=(--device=cpu --size=tiny --rows=S1 --steps=1 --repeats=1)
    kernels+=(--device=cpu --size=tiny --rows=A4 --ms=1 --rounds=1)
else
    tests+=("${parallel[@]}" tests/kernels/test_gpu.py tests/kernels/test_gpu_steps.py)
    tests+=(-k "not cpu and not beyond and not peak")
    tiles+=(--seconds=70)
    profile+=(--rows=S1,S2,S4,S3 --seconds=85)
    steps+=(--rows=S1,S2,S4 --steps=3 --seconds=110)
    kernels+=(--rows=A3,C1,A1,C4,A4,E1r,E2,L1b,C2,A7,E3,A5,L1c --seconds=85 --row_seconds=60)
fi
part "Kernels and steps against float64" tests 100 "${tests[@]}"
part "Tensors of 2^31 elements, peak memory" large 45 "${large[@]}"
part "Tiles of attention" tiles 75 "${tiles[@]}"
part "Profile of a step" profile 90 "${profile[@]}"
part "Training steps beside transformers" steps 115 "${steps[@]}"
part "Kernels beside their alternatives" kernels 90 "${kernels[@]}"
[ -z "${OUT:-}" ] || [ "$page" -ef "$OUT/${page##*/}" ] || cp "$page" "$OUT/"
echo "written to $page"
[ -z "${failed:-}" ] || { echo "failed:$failed"; exit 1; }

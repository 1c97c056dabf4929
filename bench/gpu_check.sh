#!/usr/bin/env bash
# All that needs a GPU, in one command: the gpu tests, the kernels, and decoding with random weights. It ends within
# nine minutes, with what it has by then. A short table ends it; JSON, the table and every stage's output go to a folder.
#
#   bench/gpu_check.sh [--out DIR] [--dry-run]
#   PYTHON=/path/to/python bench/gpu_check.sh     another interpreter than python3
#
# A stage that fails or runs out of time is named, and the others go on. The exit status is 0 if every stage succeeded.
# --dry-run shows on any machine that all stages run: tiny shapes, the kernels interpreted.
set -uo pipefail

PYTHON=${PYTHON:-python3}
out=gpu-check
dry=()
total=530 # seconds for everything
while (($#)); do
    case $1 in
    --out) out=${2:?--out needs a folder} && shift 2 ;;
    --dry-run) dry=(--dry-run) && shift ;;
    -h | --help) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0" && exit 0 ;;
    *) echo "gpu_check.sh: unknown option $1; there are --out DIR and --dry-run" >&2 && exit 2 ;;
    esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
rm -f "$out"/*.json "$out"/*.log "$out"/*.tsv "$out"/table.txt

export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# What was compiled once is kept beside the results; a second run into the same folder compiles nothing.
export EEJAX_CACHE_DIR=${EEJAX_CACHE_DIR:-$out/cache}
# JAX takes memory as it needs it: processes that compile share the card, and so does PyTorch.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=.92
if ((${#dry[@]})); then
    export JAX_PLATFORMS=cpu
fi

failed=0
# note NAME STATUS SECONDS: how a stage ended.
note() {
    local result=ok
    case $2 in
    0) ;;
    124 | 137) result="FAILED: out of time" ;;
    late) result="not begun: no time left" ;;
    *) result="FAILED: exit status $2" ;;
    esac
    if [[ $result != ok ]]; then
        failed=1
        tail -n 15 "$out/$1.log" 2>/dev/null | cut -c1-300
    fi
    printf '%s\t%s\t%d\n' "$1" "$result" "$3" | tee -a "$out/stages.tsv"
}

# stage NAME SECONDS COMMAND...: run it, for so long and never beyond the end of all.
stage() {
    local name=$1 limit=$2 start=$SECONDS status=0 left=$((total - SECONDS))
    shift 2
    if ((left < 10)); then
        status=late
    else
        timeout --kill-after=10 "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1 || status=$?
    fi
    note "$name" "$status" "$((SECONDS - start))"
}

if ((${#dry[@]})); then sweep=(--dry-run); else sweep=(--quick --profile --time-limit 60); fi
check=("$PYTHON" -m bench.gpu_check --out "$out" "${dry[@]}")
kernels=("$PYTHON" -m bench kernels "${sweep[@]}")
# Only the files that have such tests: what the others need is not asked of this machine, nor a new pytest.
mapfile -t files < <(grep -lE 'mark\.gpu' tests/test_*.py)
tests=("$PYTHON" -m pytest -q -m gpu -o minversion=7 -p no:cacheprovider "${files[@]:-no test is marked gpu}")

stage compile-first 120 "${check[@]}" compile-first
start=$SECONDS
"${check[@]}" compile-rest >"$out/compile-rest.log" 2>&1 & # on the processor, while the tests run
ahead=$!
stage tests 150 "${tests[@]}"
status=0
wait "$ahead" || status=$?
note compile-rest "$status" "$((SECONDS - start))"
for op in attention fill; do
    stage "kernels-$op" 90 "${kernels[@]}" --ops "$op" --output-json "$out/kernels-$op.json"
done
read -ra models < <("${check[@]}" models)
stage "latency-${models[0]}" 120 "${check[@]}" latency --model "${models[0]}" --seconds 100
stage latency-variants 90 "${check[@]}" variants --seconds 80
for model in "${models[@]:1}"; do
    stage "latency-$model" 120 "${check[@]}" latency --model "$model" --seconds 100
done

"${check[@]}" table | tee "$out/table.txt"
exit $failed

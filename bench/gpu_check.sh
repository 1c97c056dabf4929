#!/usr/bin/env bash
# All that needs a GPU, in one command that ends within 420 seconds: kernels compared with XLA, the demo's answers, small
# measurements, the kernels' bandwidth, decoding with and without exits, a profile, the tests of the kernels.
#
#   bench/gpu_check.sh [--out DIR] [--dry-run]
#   PYTHON=/path/to/python bench/gpu_check.sh     another interpreter than python3
#
# DIR gets four files. results.jsonl grows with every figure and log.txt with the output of every process; table.txt and
# gpu-check.tgz, which contains all of it and the profile, are replaced after each stage. A stage that fails or runs out
# of time is named, and the others go on. The exit status is 0 if every stage succeeded. Packages that the machine lacks
# are installed from .gpu-wheels, which bench/gpu_wheels.sh fills on a machine with a network.
# --dry-run runs every stage on any machine, at tiny shapes, with the kernels interpreted.
set -uo pipefail

PYTHON=${PYTHON:-python3}
out=gpu-check
dry=()
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
rm -f "$out"/{results.jsonl,log.txt,table.txt,gpu-check.tgz,gpu-check.tgz.part}
: >"$out/results.jsonl" >"$out/log.txt"
tar -czf "$out/gpu-check.tgz.part" -C "$out" results.jsonl log.txt && mv "$out"/gpu-check.tgz{.part,}

# Compiled programs, traces and packages. They stay, so that a second check on the same machine compiles nothing.
work=${EEJAX_GPU_WORK:-${TMPDIR:-/tmp}/eejax-gpu-check-$UID}
mkdir -p "$work" || exit 2
rm -rf "$work/raw" "$work/logs"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export EEJAX_CACHE_DIR=${EEJAX_CACHE_DIR:-$work/cache}
# JAX allocates memory as it needs it: processes that compile share the GPU, and so does PyTorch.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=.92
if ((${#dry[@]})); then
    export JAX_PLATFORMS=cpu
fi
exec timeout --signal=TERM --kill-after=8 410 "$PYTHON" -m bench.gpu --out "$out" --work "$work" "${dry[@]}"

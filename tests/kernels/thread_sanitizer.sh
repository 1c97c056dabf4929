#!/usr/bin/env bash
# Runs the thread pool of the native kernels under ThreadSanitizer:
#
#   tests/kernels/thread_sanitizer.sh                  with `cc`, and the Python of .venv for XLA's headers
#   CC=clang PYTHON=python3 tests/kernels/thread_sanitizer.sh
#
# Fails on a data race or a wrong result, and also if a copy of the pool with a known race is not reported.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
native=$root/pallas_kernels/native
python=${PYTHON:-$root/.venv/bin/python}
include=$("$python" -c 'import jax; print(jax.ffi.include_dir())')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# build NAME SOURCE: the pool in SOURCE with its driver
build() {
  "${CC:-cc}" -O1 -g -std=gnu11 -fsanitize=thread "-I$include" "-I$native" \
    "$2" "$here/thread_pool.c" -lpthread -o "$work/$1"
}

# Address layouts that are randomised over more bits than ThreadSanitizer expects make it give up at its start.
run() {
  TSAN_OPTIONS="halt_on_error=1 exitcode=66" setarch -R "$work/$1"
}

build pool "$native/threads.c"
run pool
echo "thread pool: no race, all results right"

# The caller no longer waits until no helper can see the job, which lies on its stack.
sed '/atomic_load(&inside); turn++/d' "$native/threads.c" >"$work/racy.c"
if cmp -s "$native/threads.c" "$work/racy.c"; then
  echo "the line that waits for \`inside\` was not found in threads.c" >&2
  exit 1
fi
build racy "$work/racy.c"
status=0
run racy 2>"$work/report" || status=$?
if [ "$status" -ne 66 ]; then
  echo "the pool without its last wait was not reported (status $status)" >&2
  exit 1
fi
echo "without its last wait: $(grep -m1 -o 'WARNING: ThreadSanitizer: .*' "$work/report")"

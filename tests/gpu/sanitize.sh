#!/bin/sh
# Watch every kernel once, at small awkward sizes, by compute-sanitizer: `sh tests/gpu/sanitize.sh [OP ...]`, all by
# default; some minutes. The first run, unwatched, compiles; the tools then run side by side. Fails where one reports
# anything. racecheck of CUDA 13.0 reports the byte by which Triton tells a warp its part; that of 13.5 does not.
set -u
python=${PYTHON:-python}
sanitizer=${SANITIZER:-compute-sanitizer}
logs=$(mktemp -d)
if ! command -v "$sanitizer" > /dev/null; then
  echo "$sanitizer: not found; expected CUDA's, or that of pip install nvidia-cuda-sanitizer-api"
  exit 1
fi
$python -m tests.gpu.small "$@" > "$logs/plain" 2>&1 || { cat "$logs/plain"; exit 1; }
for tool in memcheck racecheck synccheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool $tool --error-exitcode 1 --print-limit 100 \
    $python -m tests.gpu.small "$@" > "$logs/$tool" 2>&1 && touch "$logs/$tool.ok" &
done
wait
failed=0
for tool in memcheck racecheck synccheck; do
  ran="$(grep -c ' ran$' "$logs/$tool") of $(grep -c ' ran$' "$logs/plain") ran"
  echo "$tool: $ran; $(grep -E '(ERROR|RACECHECK) SUMMARY|not supported' "$logs/$tool" | tail -1)"
  [ -e "$logs/$tool.ok" ] || { failed=1; grep -vE ' ran$' "$logs/$tool" | sort | uniq -c | head -80; }
done
exit $failed

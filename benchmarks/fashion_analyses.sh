#!/bin/sh
# The appendix's analyses B and E on Fashion-MNIST, about six minutes on one H100: sh benchmarks/fashion_analyses.sh DATA OUT [SWEEP ARGUMENTS]
# DATA holds the idx files (Debian: dataset-fashion-mnist, /usr/share/datasets/fashion-mnist); OUT gets sweep.csv, losses.csv, cka.csv and pictures.
data=$1 out=$2 runs=${RUNS:-/tmp/sweep_fashion}
shift 2
timeout "${LIMIT:-330}" python3 -m uvit_fast.cli sweep --config configs/ablations/fashion.yaml --set "data.path=$data" --jobs 9 --out "$runs" "$@"
mkdir -p "$out"
tail -n 2 "$runs"/*/log.txt > "$out/logs.txt"
python3 -m uvit_fast.cli cka --checkpoint "$runs/base" "$runs/skip-add" "$runs/skip-none" --out "$runs/cka"
cp "$runs"/*.csv "$runs"/*.png "$out"

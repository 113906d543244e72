#!/bin/sh
# Quality against time of a network that is trained for it: whole evaluations, fewer of them, cached layers, guidance, FP8.
#   sh benchmarks/front.sh digits OUT
#   sh benchmarks/front.sh fashion OUT DATA        with GPUS=2 about three minutes on two H200s
# DATA holds the idx files of Fashion-MNIST. OUT gets the run, the plans, points.csv, front.png and front.txt. The same command
# goes on where it stopped. A grid is a line of GRIDS, those of one GPU one after another; TRAIN and MEASURE are limits in seconds;
# CALIBRATED are the numbers of evaluations that get a calibrated plan.
set -eu
what=$1 out=$2 began=$(date +%s)
case $what in
digits) config="--config configs/digits.yaml --set sample.sampler=dpmpp_2m" scale=1.7 ;;
fashion)
    config="--config configs/s2_fashion.yaml --set name=s4_fashion --set model.patch_size=4 --set data.path=$3 --set train.iterations=4000"
    config="$config --set diffusion.schedule=flow --set diffusion.time=logit_normal"
    config="$config --set sample.sampler=dpmpp_2m --set sample.steps=50 --set sample.guidance_scale=0" scale=1.3 ;;
*) echo "front.sh: expected digits or fashion, got $what" >&2; exit 2 ;;
esac
cfg=1
[ "$what" = digits ] && cfg=$scale
python=${PYTHON:-python3} run=$out/run gpus=${GPUS:-1}
cli="$python -m uvit_fast.cli"
card() { echo "${CUDA_VISIBLE_DEVICES:-0,1,2,3,4,5,6,7}" | cut -d , -f $(($1 + 1)); }
said() { echo "[$(($(date +%s) - began)) s] $*"; }
mkdir -p "$out/plans"

[ -d "$run" ] || timeout -s TERM -k 20 "${TRAIN:-3600}" $cli train $config ${SETS:-} --run-dir "$run" > "$out/train.txt" 2>&1 ||
    said "training ended early: $(tail -n 1 "$out/train.txt")"
said trained

plans= evaluations=${CALIBRATED-50 30 20 14}
for steps in $evaluations; do plans=$plans,$out/plans/calibrated_$steps.yaml; done
calibrate() (
    for steps in $evaluations; do
        plan=$out/plans/calibrated_$steps
        [ -f "$plan.yaml" ] || CUDA_VISIBLE_DEVICES=$(card $((gpus - 1))) $cli calibrate --checkpoint "$run" --set sample.steps=$steps \
            --speedup 1.5 --num 64 --out "$plan.yaml" > "$plan.txt" 2>&1 &
    done
    wait
    said calibrated
)
steps="--samplers dpmpp_2m --steps 50,30,20,14,10,7,5,3 --cfg-scales $cfg"
whole=$steps cached="$steps --plans outer:2$plans"
[ "$gpus" != 1 ] || { whole="$steps --plans none,outer:2$plans" cached=; } # one start less
narrow="--samplers dpmpp_2m --steps 50,20,10 --cfg-scales $cfg --precisions fp8 --plans none$plans"
[ "$what" = fashion ] || narrow= # whose heads no kernel takes
GRIDS=${GRIDS:-"$whole
$cached
--samplers dpmpp_2m,dpm_fast --steps 20,10 --cfg-scales 1,$scale
$narrow"}
measure() { # number grid...
    i=$1 && shift
    timeout -k 10 $((${MEASURE:-36000} + began - $(date +%s))) $cli front --checkpoint "$run" --reference "$run/config.yaml" \
        --features digits-fid --seeds "${SEEDS:-2}" --num "${NUM:-10000}" --batch "${BATCH:-1000}" --cache "$out/cache" \
        "$@" --out "$out/grid_$i" > "$out/grid_$i.txt" 2>&1 || true
    said "grid $i: $(tail -n 1 "$out/grid_$i.txt" | cut -c 1-200)"
}
of() { # gpu
    echo "$GRIDS" | grep . | { i=0; while read -r grid; do
        [ $((i % gpus)) != "$1" ] || CUDA_VISIBLE_DEVICES=$(card "$1") measure $i $grid < /dev/null
        i=$((i + 1))
    done; }
}
if [ "$gpus" = 1 ]; then
    calibrate
    of 0
else # the first grid has no plans; the others wait for them, and for the classifier that it trains
    of 0 &
    calibrate
    for second in $(seq 90); do ls "$out"/cache/reference-* > /dev/null 2>&1 && break; sleep 1; done
    for gpu in $(seq $((gpus - 1))); do of "$gpu" & done
    wait
fi

# one table: all grids have the same settings
cp "$out"/grid_0/settings.json "$out"
cat "$out"/grid_*/points.csv | awk -F , '!seen[$1, $2, $3, $4, $5, $6, $7, $8]++' > "$out/points.csv" # a row a point and seed
$cli front --checkpoint "$run" --reference "$run/config.yaml" --features digits-fid --draw --out "$out"
said drawn

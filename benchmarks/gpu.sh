#!/usr/bin/env bash
# What only an accelerator can show, in under eight minutes, as one table: benchmarks/gpu.sh [FOLDER]
#
#   pip install -e ".[cuda13]" && benchmarks/gpu.sh runs/gpu
#   SIZE=tiny SHAPE=tiny LAYERS=2 benchmarks/gpu.sh runs/gpu   # tries the script on a CPU
#
# A stage that fails, or takes longer than its share, is a line of the table, and the next one starts. The table, the log
# of each stage, and a profile of each run are in FOLDER; `tables.txt` has what is to be put into RESULTS.md.
set -uo pipefail
cd "$(dirname "$0")/.."

folder=${1:-runs/gpu}
size=${SIZE:-7b-layer}
shape=${SHAPE:-llama2-7b}
layers=${LAYERS:-8} # of 32: their pair is written in a minute, and a layer costs what it costs
mkdir -p "$folder"
summary=$folder/tables.txt
pair=$folder/pair

# Runs one stage for so many seconds at most, and notes how it ended.
stage() {
  local name=$1 most=$2 start=$SECONDS status
  shift 2
  timeout -s INT -k 15 "$most" "$@" >"$folder/$name.log" 2>&1 # interrupted, a run still writes its profile
  status=$?
  printf '%-28s %5d s  %s\n' "$name" $((SECONDS - start)) \
    "$([ $status = 0 ] && echo done || echo "status $status: $(tail -n 1 "$folder/$name.log")")" | tee -a "$summary"
}

# A statistic on the pair, with its profile.
trace() {
  local name=$1 most=$2
  shift 2
  stage "$name" "$most" python -m tracing_jax compare "$pair/base" "$pair/ft" --quiet \
    --save="$folder/$name.p" --profile="$folder/profile-$name" "$@"
  [ -s "$folder/profile-$name/profile.txt" ] && cat "$folder/profile-$name/profile.txt" >>"$summary"
}

{
  date -u +%F
  git rev-parse --short HEAD 2>/dev/null
  python -c 'import jax; print(jax.__version__, *jax.devices())'
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null
} | tee "$summary"

text=$folder/text.txt
stage pair 60 python -m benchmarks.write_pair --shape="$shape" --num_layers="$layers" --save="$folder/pair"
stage text 10 python -c "import pathlib, sys; from benchmarks.pairs import write_text; write_text(pathlib.Path(sys.argv[1]))" "$text"
stage steps 70 python -m benchmarks --size="$size" --parts=steps,assignment --out_dir="$folder" --pairs_dir="$folder/pairs"
grep '|' "$folder/steps.log" >>"$summary"
trace auto-stream 60 --memory=stream
trace auto-resident 60 --memory=resident
trace mode-11-alphas 40 --stat=mode --dataset="$text" --num_tokens=16384 --dtype=bfloat16 --mode.attn --mode.emb
trace align-weights 55 --stat=l2 --l2.num_perm=0 --align --memory=resident
stage small-pair 15 python -m benchmarks.write_pair --shape=tiny --save="$folder/small-pair"
pair=$folder/small-pair
trace align-activations 40 --stat=l2 --l2.num_perm=0 --align --align_axes=embed,mlp --align_evidence=activations \
  --dataset="$text" --num_tokens=8192 --memory=resident
trace align-learned 55 --stat=l2 --l2.num_perm=0 --align --align_evidence=learned --learned.steps=100 \
  --dataset="$text" --num_tokens=8192 --memory=resident
echo "all: $SECONDS s; see $summary"

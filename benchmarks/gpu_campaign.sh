#!/usr/bin/env bash
# Everything a GPU is asked, in stages of less than nine minutes. Results: Markdown, JSON and plots in the output folder.
#
#   benchmarks/gpu_campaign.sh [OUTPUT] [STAGE...]         default: benchmarks/results/gpu, all stages
#   SIMNPO_CAMPAIGN_DRY=1 benchmarks/gpu_campaign.sh OUT   on the CPU at tiny shapes: does the script run?
#
# PYTHON names the interpreter of the environment that has simnpo installed.
set -uo pipefail
cd "$(dirname "$0")/.."
output=${1:-benchmarks/results/gpu}
shift || true
python=${PYTHON:-python}
dry=${SIMNPO_CAMPAIGN_DRY:-}
device=${dry:+cpu} device=${device:-cuda}
limit=540
all=(correctness numerics products kernels table-8b table-1b table-gemma table-smollm table-long profile
    throughput-1b throughput-8b throughput-1b-long throughput-1b-longest throughput-8b-long throughput-8b-npo
    levers fit-1b fit-8b fit-8b-long)
stages=("${all[@]}")
[ $# -gt 0 ] && stages=("$@")

campaign() { timeout $limit "$python" -m simnpo.benchmarks.campaign "$1" --output "$output" ${dry:+--dry}; }

# table NAME SHAPE TOKENS...: the suite on one head
table() {
    local name=$1 shape=$2
    shift 2
    if [ -n "$dry" ]; then
        set -- --shapes tiny --tokens 64 --sequence-tokens 16 --rounds 2 --device cpu --spectra text --rivals simnpo flat
    else
        set -- --shapes "$shape" --tokens "$@" --spectra text peaked flat --rounds 7 --minutes 7
    fi
    timeout $limit "$python" -m simnpo.cli bench "$@" --output "$output" --name "$name"
}

# random models of several GB, written once for all stages
models=${SIMNPO_CAMPAIGN_MODELS:-$(mktemp -d)}
[ -n "${SIMNPO_CAMPAIGN_MODELS:-}" ] || trap 'rm -rf "$models"' EXIT

# steps MODULE NAME SHAPE OPTIONS...: whole training steps of a model with random weights
steps() {
    local module=$1 name=$2 shape=$3
    shift 3
    if [ -n "$dry" ]; then
        shape=tiny
        # the last of an option counts
        set -- "$@" --cpu --batch-size 1 --rounds 1 --context 32
        [ "$module" = levers ] && set -- "$@" --only "every row" || set -- "$@" --loops published
    fi
    timeout $limit "$python" -m "simnpo.benchmarks.$module" --model-shape "$shape" --models "$models" "$@" \
        --output "$output" --name "$name"
}

fit() {
    local name=$1
    shift
    timeout $limit "$python" -m simnpo.benchmarks.fit "$@" --models "$models" --output "$output" --name "$name" ${dry:+--dry}
}

failed=()
for stage in "${stages[@]}"; do
    echo "== $stage"
    case $stage in
    correctness) SIMNPO_TEST_DEVICE=$device timeout $limit "$python" -m pytest -q tests/test_device.py tests/test_device_ranks.py ;;
    numerics | products | kernels | profile) campaign "$stage" ;;
    table-8b) table "$stage" llama-3.1-8b 8192 2048 ;;
    table-1b) table "$stage" llama-3.2-1b 512 2048 8192 32768 ;;
    table-gemma) table "$stage" gemma-2-2b 2048 8192 ;;
    table-smollm) table "$stage" smollm2 512 2048 8192 32768 ;;
    table-long) table "$stage" llama-3.1-8b 131072 ;;
    # rows of TOFU's lengths; then documents, one to forget and one to retain, each loop until it no longer fits
    throughput-1b) steps throughput "$stage" llama-3.2-1b --batch-size 4 16 --rounds 7 --npo-rounds 9 ;;
    throughput-8b) steps throughput "$stage" llama-3.1-8b --lora --batch-size 4 --rounds 5 --npo-rounds 7 --memory-limit 80GB ;;
    throughput-1b-long) steps throughput "$stage" llama-3.2-1b --gradient-checkpointing --batch-size 1 --rounds 3 \
        --minutes 7 --context 512 2048 8192 32768 ;;
    throughput-1b-longest) steps throughput "$stage" llama-3.2-1b --gradient-checkpointing --batch-size 1 --rounds 1 \
        --context 131072 ;;
    throughput-8b-long) steps throughput "$stage" llama-3.1-8b --lora --gradient-checkpointing --batch-size 1 --rounds 1 \
        --minutes 6 --context 512 2048 8192 32768 ;;
    # its log-ratio read in float32 before each step
    throughput-8b-npo) steps throughput "$stage" llama-3.1-8b --lora --gradient-checkpointing --batch-size 1 --rounds 1 \
        --npo-rounds 3 --context 8192 --loops open-unlearning ;;
    levers) steps levers "$stage" llama-3.2-1b --batch-size 1 --rounds 3 --tile-tokens 2048 --chunk-tokens 1024 --context 4096 ;;
    fit-1b) fit "$stage" 1b-full ;;
    fit-8b) fit "$stage" 8b-lora ;;
    fit-8b-long) fit "$stage" 8b-4bit ;;
    *)
        echo "unknown stage: $stage (known: ${all[*]})" >&2
        exit 2
        ;;
    esac || failed+=("$stage")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }

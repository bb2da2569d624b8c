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
stages=(correctness numerics products kernels table-8b table-1b table-gemma table-smollm table-long profile)
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
    *)
        echo "unknown stage: $stage (known: correctness numerics products kernels table-8b table-1b table-gemma table-smollm table-long profile)" >&2
        exit 2
        ;;
    esac || failed+=("$stage")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }

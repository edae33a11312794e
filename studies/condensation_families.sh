#!/bin/sh
# Condensation by depth and by model size in the paper's four families, as far as one GPU of 80 GB holds them (the
# paper goes on to Qwen2.5-72B and Qwen3-32B). Forward passes only: about one A100 hour in all, downloads of 190 GB
# not counted. The paper's texts are 100 of up to 512 tokens; name your own: TEXTS="texts/*.txt" sh studies/...
#
#     sh studies/condensation_families.sh [FOLDER]       # one page per family: FOLDER/gpt2/condensation.html, ...
#
# A model that cannot be had is named and left out (exit status 1); the same command again replaces its rows.
set -u
out=${1:-results/families}
status=0
measure() {
  family=$1
  shift
  # $TEXTS is left unquoted on purpose: it may be several names.
  python -m raydisp.measure "$@" ${TEXTS:+--texts $TEXTS} --num-texts 100 --max-tokens 512 --figures \
    --out "$out/$family" || status=1
}
measure gpt2 openai-community/gpt2 openai-community/gpt2-medium openai-community/gpt2-large openai-community/gpt2-xl
measure qwen2.5 Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-1.5B Qwen/Qwen2.5-3B Qwen/Qwen2.5-7B Qwen/Qwen2.5-14B
measure qwen3 Qwen/Qwen3-0.6B Qwen/Qwen3-1.7B Qwen/Qwen3-4B Qwen/Qwen3-8B Qwen/Qwen3-14B
measure bloom bigscience/bloom-560m bigscience/bloom-1b1 bigscience/bloom-1b7 bigscience/bloom-3b bigscience/bloom-7b1
exit $status

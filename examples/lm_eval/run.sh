#!/bin/sh
# One multiple-choice and one generation task of lm-eval on a bundled checkpoint: sh examples/lm_eval/run.sh [CHECKPOINT]
set -e
cd "$(dirname "$0")"
model=$(dllm-plugin checkpoint "${1:-tiny-sdar}")
port=${PORT:-8123}
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
python write_questions.py --output questions.jsonl --count "${COUNT:-40}"
VLLM_CPU_KVCACHE_SPACE=1 vllm serve "$model" --served-model-name tiny --port "$port" > server.log 2>&1 &
trap 'kill $!' EXIT
until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health"; do
  kill -0 $! || { cat server.log; exit 1; }
  sleep 1
done
"${LM_EVAL:-lm_eval}" --model local-completions --include_path . --tasks tiny_choice,tiny_answer --apply_chat_template \
  --model_args "model=tiny,tokenizer=$model,base_url=http://127.0.0.1:$port/v1/completions,num_concurrent=8,max_retries=1"

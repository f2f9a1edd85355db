#!/usr/bin/env bash
# Makes everything that ships from seeds, stage by stage: base, scorers, encoder -> hypernetwork -> a demo.
# Every stage can resume: run the same command again to continue. It takes about ten hours on two cores.
#     SETTING=short   shortens every stage: weaker weights, in about six minutes on two cores
#     PRECISION=float32   for CPUs without instructions for bf16, which take many times as long otherwise
#     OUT, PACK       name other folders than out/ and the package itself
set -euo pipefail
cd "$(dirname "$0")/.."

SETTING=${SETTING:-full}
PRECISION=${PRECISION:-bf16}
OUT=${OUT:-out/$SETTING}
PACK=${PACK:-src/hyperdreambooth/avatars/assets}
stages="vae wide encoder base shapes decoder identity attributes unlabelled"
world=() train=(--set "precision=$PRECISION")
for stage in $stages; do world+=(--set "$stage.precision=$PRECISION"); done
people=20000
if [ "$SETTING" = short ]; then
  people=200
  for stage in $stages; do
    world+=(--set "$stage.steps=60" --set "$stage.people=200" --set "$stage.checkpoint_every=20")
  done
  train+=(--set steps=60 --set batch=8 --set validate_every=60)
fi

hdb avatars build --out "$OUT/world" --pack "$PACK" "${world[@]}"
hdb avatars render --split train --identities "$people" --photos 4 --out "$OUT/train"
hdb train "$OUT/train" --base "$PACK/base" --config avatars --set encoder="$OUT/world/encoder" --out "$OUT/hypernet" "${train[@]}"

mkdir -p "$PACK/hypernet"
cp -r "$OUT/hypernet/config.json" "$OUT/hypernet/model.safetensors" "$OUT/hypernet/familiar.safetensors" "$OUT/hypernet/README.md" "$OUT/hypernet/encoder" "$PACK/hypernet/"
cp "$OUT/hypernet/run/log.jsonl" "$PACK/logs/hypernet.jsonl"

hdb demo --base "$PACK/base" --hypernet "$PACK/hypernet" --out "$OUT/demo"

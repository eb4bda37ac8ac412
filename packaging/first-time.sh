#!/bin/sh
# Makes the coordinator and the three nodes of compose.yaml, with drawn faces; to be run once. What it is given are options
# of the run, such as --num-rounds 50. Between organisations these steps are taken by several people, and what is
# read here is read by telephone: docs/deployment.md.
set -eu
cd "$(dirname "$0")"

at() { docker compose run --rm -T "$@"; }

docker compose build
at coordinator coordinator init --address coordinator:9092 --privacy-model local --min-clients 3 "$@"
for node in client-1 client-2 client-3; do
    at coordinator coordinator invite "$node" --out "/exchange/$node.kit.toml"
    at "$node" client init --data "procedural:persons=800,images=2,seed=${node#client-}"
    at --entrypoint cp "$node" "/exchange/$node.kit.toml" .
    at "$node" client join "$node.kit.toml" --out "/exchange/$node.request.toml"
    read=$(at "$node" client fingerprint)
    at coordinator coordinator nodes --approve "/exchange/$node.request.toml" --fingerprint "$read"
done
echo "done; now: docker compose up --detach"

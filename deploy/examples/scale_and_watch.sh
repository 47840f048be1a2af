#!/bin/sh
# Scale a deployment of docker-compose.yml while it runs, and watch the nodes come and go.
#
#   ./scale_and_watch.sh [PREFILL] [DECODE]        from the folder of docker-compose.yml
#
# What a node that goes still had open ends on it, or on another one. COMPOSE names the command,
# where it is not `docker compose`.
set -eu
compose=${COMPOSE:-docker compose}
prefill=${1:-2}
decode=${2:-2}

nodes() {
    $compose exec -T gateway pdq nodes
}

$compose up --detach --no-recreate --scale "prefill=$prefill" --scale "decode=$decode"
for _ in $(seq 120); do
    ready=$(nodes | awk '$3 == "ready" && ($2 == "prefill" || $2 == "decode")' | wc -l)
    echo "$ready of $((prefill + decode)) nodes are ready"
    if [ "$ready" -eq $((prefill + decode)) ]; then
        nodes
        exit 0
    fi
    sleep 1
done
nodes
echo "not all nodes came or went: $compose logs says why" >&2
exit 1

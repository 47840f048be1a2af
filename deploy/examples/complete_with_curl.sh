#!/bin/sh
# A completion with curl, whole and as a stream.   ./complete_with_curl.sh [URL] [PROMPT]
set -eu
url=${1:-http://127.0.0.1:8000}
prompt=${2:-Once upon a time}

body=$(printf '{"prompt": "%s", "max_tokens": 32, "temperature": 0.6, "seed": 7' "$prompt")
set -- --silent --show-error --fail-with-body -H 'Content-Type: application/json'
if [ -n "${PDQ_API_KEY:-}" ]; then
    set -- "$@" -H "Authorization: Bearer $PDQ_API_KEY"
fi

curl "$@" "$url/v1/completions" -d "$body}"
echo
curl "$@" --no-buffer "$url/v1/completions" -d "$body, \"stream\": true}"

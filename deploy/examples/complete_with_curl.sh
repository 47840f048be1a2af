#!/bin/sh
# A completion with curl, whole and as a stream.   ./complete_with_curl.sh [URL] [PROMPT]
set -eu
url=${1:-http://127.0.0.1:8000}
prompt=${2:-Once upon a time}

body=$(printf '{"prompt": "%s", "max_tokens": 32, "temperature": 0.6, "seed": 7' "$prompt")

ask() {
    # The key goes in by stdin: a command line is for everybody to read.
    printf '%s\n' "${PDQ_API_KEY:+Authorization: Bearer $PDQ_API_KEY}" |
        curl --silent --show-error --fail-with-body -H 'Content-Type: application/json' -H @- \
            "$url/v1/completions" "$@"
}

ask -d "$body}"
echo
ask --no-buffer -d "$body, \"stream\": true}"

#!/usr/bin/env bash
# Run a command and note its seconds: tools/stage.sh NAME COMMAND ...      tools/stage.sh (nothing else) prints the notes.
set -euo pipefail
notes=_build/seconds
mkdir -p _build
if [ $# = 0 ]; then
    echo; echo "seconds per stage:"
    awk -F'\t' '{ printf "  %-24s %5d\n", $1, $2; all += $2 } END { printf "  %-24s %5d\n", "all", all }' "$notes"
    exit
fi
name=$1 start=$SECONDS; shift
"$@" && code=0 || code=$?
printf '%s\t%d\n' "$name" $((SECONDS - start)) >> "$notes"
exit "$code"

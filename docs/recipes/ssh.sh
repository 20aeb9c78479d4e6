#!/usr/bin/env bash
# Trains on machines that are reached by SSH, with one process on each; when one fails, all end. Run
# it on any of them, in a directory that they share and that contains memopt's .venv:
#   docs/recipes/ssh.sh node1 node2 -- .venv/bin/memopt pretrain \
#       --model 1b --data '/data/**/*.jsonl' --tokenizer /data/tokenizer.json \
#       --mesh data=2,fsdp=8 --batch-size 64 --output runs/1b
# Ctrl-C saves before all end. After a failure, run the same command with --resume. Process 0 is on
# the first machine, at port $PORT.
set -euo pipefail

hosts=()
while (($#)) && [[ $1 != -- ]]; do
    hosts+=("$1")
    shift
done
if ((${#hosts[@]} == 0 || $# < 2)); then
    echo "usage: ssh.sh HOST ... -- COMMAND ..." >&2
    exit 2
fi
shift
command=("$@" --coordinator "${hosts[0]#*@}:${PORT:-12321}" --processes "${#hosts[@]}")

# Runs on each machine: the command, which is terminated when standard input closes.
remote='
exec 3<&0
cd "$1" && shift
"$@" </dev/null &
process=$!
{ while read -r _; do :; done; kill "$process"; } <&3 &
watch=$!
status=0
wait "$process" || status=$?
kill "$watch" 2>/dev/null
exit "$status"'

# All processes read standard input from a pipe that only this script holds open, while it runs.
directory=$(mktemp -d)
trap 'rm -r "$directory"' EXIT
mkfifo "$directory/alive"
exec 9<>"$directory/alive"
trap 'exec 9>&-' INT TERM HUP
for index in "${!hosts[@]}"; do
    printf -v line '%q ' bash -c "$remote" memopt "$PWD" "${command[@]}" --process "$index"
    ssh -o BatchMode=yes "${hosts[index]}" "$line" 0<"$directory/alive" 9>&- &
done

status=0
left=${#hosts[@]}
while ((left)); do
    code=0
    wait -n -p ended || code=$?
    if [[ -z ${ended:-} ]]; then continue; fi # a signal: all processes save and end
    left=$((left - 1))
    if ((code)); then
        exec 9>&-
        if ((status == 0)); then status=$code; fi
    fi
done
exit "$status"

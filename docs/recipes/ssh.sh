#!/usr/bin/env bash
# One process on each host, by plain SSH; the first host coordinates:
#   docs/recipes/ssh.sh "node-a node-b" --model 1b --mesh fsdp=16 --output runs/1b
# Further arguments are those of `memopt pretrain`. It is started in this directory, which all
# hosts share. If one host fails, the others end within the heartbeat's time; with --resume
# everything goes on from the last checkpoint.
set -uo pipefail

read -ra hosts <<<"$1"
shift
coordinator=${COORDINATOR:-${hosts[0]}:1234}
arguments=$(printf ' %q' "$@")

started=()
for i in "${!hosts[@]}"; do
    together="--coordinator $coordinator --processes ${#hosts[@]} --process $i"
    ${SSH:-ssh -tt} "${hosts[i]}" "cd $(printf %q "$PWD") && memopt pretrain$arguments $together" &
    started+=($!)
done
trap 'kill -TERM "${started[@]}" 2>/dev/null' INT TERM # the runs save and stop

worst=0
for pid in "${started[@]}"; do
    wait "$pid" || worst=$?
done
exit "$worst"

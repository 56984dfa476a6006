#!/usr/bin/env bash
# Shuts this machine down after fifteen minutes without Ray. Workers of aws.yaml and gcp.yaml run it in the background: if
# the head is lost, so is the autoscaler that would end them, and they would be billed until somebody notices.
set -euo pipefail
minutes=15
exec 9> "$HOME/.leap-watchdog"
flock --nonblock 9 || exit 0 # one is running already

without=0
while [ "$without" -lt "$minutes" ]; do # minutes are counted, because the clock may jump
    sleep 60
    if pgrep -x raylet > /dev/null; then without=0; else without=$((without + 1)); fi
done
echo "watchdog: no raylet for $minutes minutes; this machine is shut down"
sudo shutdown -h now

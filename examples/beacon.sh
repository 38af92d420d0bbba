#!/bin/sh
# A daemon in shell: says that it is ready, feeds its watchdog, and tells that it works less while it is drained.
say() { systemd-notify "$@"; }

drained() { say --status="drained" "X_QD_HEALTH=degraded:drained"; }
lifted() { say --status="shining" "X_QD_HEALTH=healthy"; }
trap drained USR1
trap lifted USR2
trap 'say --status="going out" STOPPING=1; echo "beacon out"; exit 0' TERM INT

echo "beacon lit"
say --ready --status="shining"
while :; do
    say WATCHDOG=1
    sleep 2 &
    wait $!
done

#!/usr/bin/env bash
# Runs on every worker of a slice; the other scripts call it there.
#   worker.sh setup [HOST:/FOLDER]    puts this tree at ~/jaxcl, makes ~/jaxcl-venv, mounts the folder at /mnt/runs
#   worker.sh start JOB ARG...        starts `python -m jaxcl.main ARG...`, detached
#   worker.sh status JOB              a line: state=running, exit (with code=, and cause= and step= of jaxcl/retry.py),
#                                     stopped (by hand), lost, absent, or bare: not set up; args= is a checksum of what
#                                     the job was started with
#   worker.sh halt JOB [SECONDS]      SIGTERM, after which the run saves and leaves; SIGKILL when SECONDS are over
#   worker.sh stop JOB [SECONDS]      the same, and the babysitter does not start it again
#   worker.sh log JOB [LINES [follow]]
# A job is a folder ~/jaxcl-jobs/JOB with args, pid, log, exit and lock. The lock is held while it runs, by attend and
# the run itself: neither a number that another process got nor a machine that was started again can be taken for it.

set -euo pipefail

jobs=$HOME/jaxcl-jobs
tree=$HOME/jaxcl
venv=$HOME/jaxcl-venv
mount=${JAXCL_MOUNT:-/mnt/runs}

die() {
  printf 'worker.sh on %s: error: %s\n' "$(hostname)" "$1" >&2
  exit "${2:-2}"
}

# python: the newest that is new enough, or nothing. TPU images have had 3.10.
python() {
  local one
  for one in python3.14 python3.13 python3.12 python3.11 python3; do
    if "$one" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$one"
      return
    fi
  done
}

# mounted: the folder is there, also after the machine was started again. A run that found it empty would begin anew.
mounted() {
  local share
  [ -f "$tree/.share" ] || return 0
  share=$(cat "$tree/.share")
  if [ -z "$share" ] || mountpoint -q "$mount"; then return; fi
  command -v mount.nfs >/dev/null 2>&1 || sudo apt-get install -y -qq nfs-common
  sudo mkdir -p "$mount"
  # nolock: the lock of a machine that was taken away would stay, and keep the next one out of the workdir.
  sudo mount -t nfs -o hard,nolock "$share" "$mount"
  [ -w "$mount" ] || sudo chown "$(id -u)" "$mount"
}

setup() {
  local fresh one
  fresh=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  for one in "$jobs"/*/; do
    [ ! -d "$one" ] || ! running "$one" || die "job $(basename "$one") is running; stop it first" 5
  done
  printf '%s\n' "${1-$(cat "$tree/.share" 2>/dev/null || true)}" >"$fresh/.share"
  rm -f "$fresh/.ready"
  if [ "$fresh" != "$tree" ]; then
    rm -rf "$tree.old"
    [ ! -d "$tree" ] || mv "$tree" "$tree.old"
    mv "$fresh" "$tree"
  fi
  mounted
  if [ ! -x "$venv/bin/python" ]; then
    one=$(python)
    if [ -n "$one" ]; then
      "$one" -m venv "$venv"
    else
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --seed --python 3.12 "$venv"
    fi
  fi
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --editable "${tree}[tpu]"
  : >"$tree/.ready"
  printf 'jaxcl host=%s state=ready\n' "$(hostname)"
}

# running FOLDER: somebody holds the lock.
running() { [ -f "$1/lock" ] && ! flock -n "$1/lock" true; }

start() {
  local job=$1 folder=$jobs/$1 i
  shift
  [ -f "$tree/.ready" ] || die 'not set up; run setup.sh'
  mounted
  mkdir -p "$folder"
  exec 9>>"$folder/lock"
  flock -n 9 || die "job $job is running; resume.sh stops it and goes on" 5
  rm -f "$folder/exit" "$folder/cause" "$folder/pid" "$folder/stopped"
  (umask 077 && printf '%s\0' "$@" >"$folder/args")
  printf '\n== %s: starts\n' "$(date -u +%FT%TZ)" >>"$folder/log"
  nohup setsid bash "${BASH_SOURCE[0]}" attend "$job" "$@" >>"$folder/log" 2>&1 </dev/null &
  exec 9>&-
  for ((i = 0; i < 100; i++)); do
    [ ! -s "$folder/pid" ] || break
    sleep 0.1
  done
  status "$job"
}

# attend JOB ARG...: waits for the run and keeps its exit status. It has the lock from start.
attend() {
  local folder=$jobs/$1 child code=0
  shift
  cd "$tree"
  export JAXCL_CLUSTER=tpu JAXCL_STOPPED=75 PYTHONUNBUFFERED=1
  trap '' TERM INT HUP # of halt they are for the run, not for this
  (trap - TERM && exec "$venv/bin/python" -m jaxcl.main "$@") &
  child=$!
  printf '%s\n' "$child" >"$folder/pid"
  wait "$child" || code=$?
  name "$folder" "$code" "$@" >"$folder/cause"
  printf '%s\n' "$code" >"$folder/exit.new"
  mv "$folder/exit.new" "$folder/exit"
  printf '== %s: ends with %s\n' "$(date -u +%FT%TZ)" "$code $(cat "$folder/cause")"
}

# name FOLDER CODE ARG...: why the run ended, from its status, its log and its ledger; nothing if that cannot be said.
name() {
  local folder=$1 code=$2
  shift 2
  "$venv/bin/python" -m jaxcl.retry name --status="$code" --ran="$SECONDS" --log="$folder/log" -- "$@" 2>/dev/null || true
}

status() {
  local folder=$jobs/$1 state args=none
  if [ ! -f "$tree/.ready" ]; then
    state=bare
  elif [ ! -f "$folder/args" ]; then
    state=absent
  elif running "$folder"; then
    state=running
  elif [ -f "$folder/stopped" ]; then
    state=stopped
  elif [ -f "$folder/exit" ]; then
    state="exit code=$(cat "$folder/exit") $(cat "$folder/cause" 2>/dev/null || true)"
  else
    state=lost # the machine was started again, or attend was killed
  fi
  [ ! -f "$folder/args" ] || args=$(cksum <"$folder/args" | tr ' ' -)
  printf 'jaxcl job=%s host=%s args=%s state=%s\n' "$1" "$(hostname)" "$args" "$state"
}

# halt JOB [SECONDS]
halt() {
  local folder=$jobs/$1
  if running "$folder"; then
    kill -TERM "$(cat "$folder/pid")" 2>/dev/null || true
    if ! flock -w "${2:-300}" "$folder/lock" true; then
      printf 'worker.sh: job %s did not end within %s s; killed\n' "$1" "${2:-300}" >&2
      kill -KILL "$(cat "$folder/pid")" 2>/dev/null || true
      flock -w 30 "$folder/lock" true || die "job $1 cannot be killed; delete this slice" 1
    fi
  fi
  status "$1"
}

stop() {
  mkdir -p "$jobs/$1"
  : >"$jobs/$1/stopped"
  halt "$@"
}

log() {
  [ -f "$jobs/$1/log" ] || die "job $1: has no log here"
  tail -n "${2:-100}" ${3:+-F} "$jobs/$1/log"
}

[ $# -gt 0 ] || die 'say what to do: setup, start, status, halt, stop or log'
verb=$1
shift
case $verb in
  setup) setup "$@" ;;
  start | status | halt | stop | log | attend)
    [[ ${1:-} =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] || die 'name a job'
    "$verb" "$@"
    ;;
  *) die "$(printf %q "$verb"): unknown; say setup, start, status, halt, stop or log" ;;
esac

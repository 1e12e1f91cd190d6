#!/usr/bin/env bash
# Sees a job through, whatever is taken back on the way:
#   babysit.sh --yes --name=NAME --zone=ZONE --project=PROJECT --accelerator=TYPE --runtime=VERSION --capacity=KIND \
#     --share=HOST:/FOLDER -- --config=FILE --workdir=/mnt/runs/NAME
# It requests the slices, installs, starts the job, and looks every --poll seconds. Slices that were preempted or failed are
# deleted and requested again, and the run continues from its last checkpoint. All it knows is in the cloud: it can be
# interrupted and started again at any time, and Ctrl-C leaves the job as it is. Without -- it takes the arguments of run.sh.
#   flags of create.sh and setup.sh
#   --yes       it may delete and request NAME again without asking
#   --delete    delete the slices when the job has ended
#   --retries   failures in a row before it gives up (default 5); preemptions and stopped runs are none
#   --backoff   seconds before the first retry, twice as many before each further one, at most 900 (default 30)
#   --poll      (default 60)
#   --dry-run   show what an undisturbed job takes
# Ends with 0: finished; 2 or 3: that of the job, which must not be repeated; 130: stopped by stop.sh; 1: gave up.

set -euo pipefail
. "$(dirname "$0")/settings.sh"

settings "$cloud accelerator runtime capacity wait network subnetwork service-account share yes delete retries backoff poll" "$@"
check_cloud
opt_retries=${opt_retries:-5} opt_backoff=${opt_backoff:-30} opt_poll=${opt_poll:-60}
check retries '[0-9]{1,4}' N
check backoff '[0-9]{1,4}' SECONDS
check poll '[0-9]{1,4}' SECONDS
need_gcloud
if [ -z "$has_job" ]; then recall; fi
check_job
confirm "deleting and requesting $opt_name again whenever it is taken back"
remember

request=("${passed[@]}")
for flag in accelerator runtime capacity wait network subnetwork service-account; do
  variable="opt_${flag//-/_}"
  [ -z "${!variable}" ] || request+=(--"$flag=${!variable}")
done
"$here/create.sh" "${request[@]}" --dry-run >/dev/null # what is wrong with the flags is said now, not after a preemption

create() { "$here/create.sh" "${request[@]}"; }
install() { "$here/setup.sh" "${passed[@]}" ${opt_share:+--share="$opt_share"}; }
start() { on_workers "$(worker start "$opt_job" "${job_args[@]}")"; }
delete() { queued delete "$opt_name" --force; }

if [ -n "$opt_dry_run" ]; then
  create
  state
  install
  start
  node_states
  report
  [ -z "$opt_delete" ] || delete
  exit
fi

failures=0 # in a row
uneven=0   # looks in a row at workers that do not agree
since=     # when the job was started, or was first seen running; before that, how it ended is from another time
args=$(printf '%s\0' "${job_args[@]}" | cksum | tr ' ' -)

pause() { [ "$1" = 0 ] || sleep "$1"; }

# trouble WHAT: one failure more; waits, or gives up.
trouble() {
  failures=$((failures + 1))
  if [ "$failures" -gt "$opt_retries" ]; then
    say "error: $1; gave up after $opt_retries retries. $opt_name is left as it is, and costs: see status.sh, delete.sh"
    exit 1
  fi
  local seconds=$opt_backoff i
  for ((i = 1; i < failures && seconds < 900; i++)); do seconds=$((seconds * 2)); done
  [ "$seconds" -le 900 ] || seconds=900
  say "$1; retry $failures of $opt_retries in $seconds s"
  pause "$seconds"
}

# finish STATUS WHAT
finish() {
  say "$2"
  if [ -n "$opt_delete" ]; then
    delete || say "error: $opt_name was not deleted, and costs; see delete.sh"
  else
    say "$opt_name is left as it is, and costs until delete.sh is run"
  fi
  exit "$1"
}

request() {
  local said
  say "requests $opt_name"
  if said=$(create 2>&1); then return; fi
  said=$(printf '%s' "$said" | tail -n 3 | tr '\n' ' ')
  case $said in
    *ALREADY_EXISTS* | *'already exists'*) ;;
    *PERMISSION_DENIED* | *INVALID_ARGUMENT* | *UNAUTHENTICATED* | *'does not have permission'*)
      say "error: the request was refused: $said"
      exit 1
      ;;
    *) trouble "the request was refused: $said" ;;
  esac
}

# again WHY: deletes the request, so that the next look finds none.
again() {
  say "$1; deletes $opt_name and requests it again"
  delete || trouble "$opt_name could not be deleted"
}

# launch: installs where that is needed, and starts.
launch() {
  case $reported in
    *state=bare*) if ! install; then
      trouble 'installing failed'
      return
    fi ;;
  esac
  if ! start; then
    on_workers "$(worker halt "$opt_job")" || true # some may have started, and wait for the others
    trouble 'starting failed'
    return
  fi
  since=$SECONDS uneven=0
}

# judge: what to do, from the lines of all workers.
judge() {
  local count=$1 running codes
  reported=$(printf '%s\n' "$reported" | grep -o 'jaxcl .*state=.*' || true)
  running=$(printf '%s\n' "$reported" | grep -c 'state=running' || true)
  codes=$(printf '%s\n' "$reported" | sed -n 's/.*state=exit code=\([0-9]*\).*/\1/p' | sort -un | tr '\n' ' ')
  if [ "$(printf '%s\n' "$reported" | grep -c 'state=' || true)" != "$count" ]; then
    trouble "not all of the $count workers answer"
    return
  fi
  if printf '%s\n' "$reported" | grep -v 'state=bare' | grep -v -e "args=$args " -e 'args=none ' >/dev/null; then
    [ "$running" = 0 ] || die "job $opt_job of $opt_name runs with other arguments; stop it (stop.sh), or choose another --job"
    launch
    return
  fi
  if [ -n "$since" ]; then
    case " $codes" in
      *' 2 '*) finish 2 'the job ends with 2: bad input; its log says which (logs.sh)' ;;
      *' 3 '*) finish 3 'the job ends with 3: training cannot go on; its log says why (logs.sh)' ;;
      *' 130 '*) finish 130 'the job was interrupted by hand; resume.sh goes on with it' ;;
    esac
    case $reported in
      *state=stopped*) [ "$running" != 0 ] || finish 130 'the job was stopped by hand; resume.sh goes on with it' ;;
    esac
  fi
  if [ "$running" = "$count" ]; then
    uneven=0
    since=${since:-$SECONDS}
    [ $((SECONDS - since)) -lt 3600 ] || failures=0
    pause "$opt_poll"
  elif [ "$running" != 0 ]; then
    uneven=$((uneven + 1)) # ending, or starting; or some died and the others wait for them
    if [ "$uneven" -gt 3 ]; then
      say 'some workers run and some do not; stops them all'
      on_workers "$(worker halt "$opt_job")" || trouble 'they cannot be stopped'
      uneven=0
    else
      pause "$opt_poll"
    fi
  else
    settle "$codes"
  fi
}

# settle CODES: no worker runs the job.
settle() {
  local code bad=
  for code in ${since:+$1}; do
    case $code in
      0 | "$STOPPED" | 143) ;; # 143: SIGTERM before the run could listen to it
      *) bad="$bad $code" ;;
    esac
  done
  case ${since:+$reported} in
    *state=lost*) trouble 'a machine was started again under the job' ;;
    *) if [ -n "$bad" ]; then
      trouble "the job failed, exit status$bad"
    elif [ "$1" = '0 ' ] && ! printf '%s\n' "$reported" | grep -v 'state=exit' >/dev/null; then
      finish 0 'the job has finished'
    fi ;;
  esac
  launch
}

while :; do
  if ! found=$(state); then
    trouble 'the state of the request is not known'
    continue
  fi
  case $found in
    absent) request ;;
    ACTIVE)
      if ! nodes=$(node_states); then
        trouble 'the state of the slices is not known'
        continue
      fi
      case $nodes in
        *PREEMPTED* | *TERMINATED* | *STOPPED* | *STOPPING* | *DELETING*) again 'a slice was taken back' && continue ;;
      esac
      if printf '%s\n' "$nodes" | grep -v '^READY' >/dev/null; then
        pause "$opt_poll"
        continue
      fi
      if reported=$(report); then
        judge "$(printf '%s\n' "$nodes" | awk '{ all += $2 } END { print all }')"
      else
        trouble 'the workers cannot be reached'
      fi
      ;;
    SUSPENDED) again 'the slices were taken back' ;;
    FAILED)
      trouble 'the request failed'
      again 'the request failed'
      ;;
    *)
      say "$opt_name is $found"
      pause "$opt_poll"
      ;;
  esac
done

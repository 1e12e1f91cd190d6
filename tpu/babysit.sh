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
#   --backoff   seconds before the first retry, twice as many before each further one, at most 900 (default 30); it waits
#               between half and the whole of that. What follows from which end is decided by jaxcl/retry.py
#   --poll      (default 60)
#   --limit     seconds after which a call that only looks is given up, a failure of the cloud (default 120; five times that
#               to look at the workers); --limit-long: one that does something (default 1800). 0: never
#   --dry-run   show what an undisturbed job takes
# Ends with 0: finished; 2 or 3: that of the job, which must not be repeated; 130: stopped by stop.sh; 1: gave up.

set -euo pipefail
. "$(dirname "$0")/settings.sh"

settings "$cloud accelerator runtime capacity wait network subnetwork service-account share yes delete retries backoff poll" "$@"
check_cloud job
check_share
opt_retries=${opt_retries:-5} opt_backoff=${opt_backoff:-30} opt_poll=${opt_poll:-60}
check retries '[0-9]{1,4}' N
check backoff '[0-9]{1,4}' SECONDS
check poll '[1-9][0-9]{0,3}' 'SECONDS, at least 1'
need_gcloud
need python3 'install Python 3.9 or newer'
if [ -z "$has_job" ]; then recall; fi
check_job "$opt_share"
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

uneven=0 # looks in a row at workers that do not agree
well=    # when it was started, or last failed
since=   # when the job was started, or was first seen running; before that, how it ended is from another time
args=$(printf '%s\0' "${job_args[@]}" | cksum | tr ' ' -)
history=$(mktemp) # of failures, as jaxcl/retry.py keeps it
errors=$(mktemp)  # what looking wrote when it failed
trap 'rm -f "$history" "$errors"' EXIT

pause() { [ "$1" = 0 ] || sleep "$1"; }

# verdict FLAG...: `ACTION SECONDS STATUS TEXT`.
verdict() {
  PYTHONPATH=$root python3 -m jaxcl.retry judge --retries="$opt_retries" --backoff="$opt_backoff" --key="$opt_name" "$@"
}

# fail FLAG...: one failure more; waits, or gives up. Fails if the slices are given up for others.
fail() {
  local found action seconds status text
  found=$(verdict --history="$history" --ran="$((SECONDS - ${well:-$SECONDS}))" "$@")
  read -r action seconds status text <<<"$found"
  [ -z "$well" ] || well=$SECONDS
  case $action in
    end)
      say "error: $text. $opt_name is left as it is, and costs: see status.sh, delete.sh"
      exit 1
      ;;
    now) say "$text" ;;
    *) say "$text in $seconds s" ;;
  esac
  pause "$seconds"
  if [ "$action" = elsewhere ]; then
    again 'the machines are not trusted any more'
    return 1
  fi
}

# trouble WHAT: one failure of the cloud more.
trouble() { fail --cause=cloud --why="$1"; }

# refused TEXT: what gcloud says, and will say again.
refused() {
  case $1 in
    *PERMISSION_DENIED* | *INVALID_ARGUMENT* | *UNAUTHENTICATED* | *'does not have permission'*) ;;
    *'have an active account selected'*) ;;
    *) return 1 ;;
  esac
}

# unseen WHAT: looking failed, as $errors says; the end if it was refused, else one failure of the cloud more.
unseen() {
  brief "$errors" >&2
  if refused "$(cat "$errors")"; then
    say "error: $1: looking was refused. $opt_name is left as it is, and costs: see status.sh, delete.sh"
    exit 1
  fi
  trouble "$1"
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
  if create >"$errors" 2>&1; then return; fi
  said=$(brief "$errors" | tr '\n' ' ')
  case $said in
    *ALREADY_EXISTS* | *'already exists'*) return ;;
    *"$unanswered"*)
      trouble "$said"
      return
      ;;
  esac
  if refused "$(cat "$errors")"; then
    say "error: the request was refused: $said"
    exit 1
  fi
  trouble "the request was refused: $said"
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
    end_job halt || true # some may have started, and wait for the others
    trouble 'starting failed'
    return
  fi
  since=$SECONDS well=$SECONDS uneven=0
}

# judge: what to do, from the lines of all workers.
judge() {
  local count=$1 running found action="" seconds status="" text
  reported=$(printf '%s\n' "$reported" | grep -o 'jaxcl .*state=.*' || true)
  running=$(printf '%s\n' "$reported" | grep -c 'state=running' || true)
  if [ "$(printf '%s\n' "$reported" | grep -c 'state=' || true)" != "$count" ]; then
    trouble "not all of the $count workers answer"
    return
  fi
  if printf '%s\n' "$reported" | grep -v 'state=bare' | grep -v -e "args=$args " -e 'args=none ' >/dev/null; then
    [ "$running" = 0 ] || die "job $opt_job of $opt_name runs with other arguments; stop it (stop.sh), or choose another --job"
    launch
    return
  fi
  case ${since:+$reported} in
    *'state=exit code='*)
      found=$(verdict --report="$reported" --retries=9999) # what follows at once, whatever was before
      read -r action seconds status text <<<"$found"
      [ "$action $status" = 'end 0' ] || [ "$action" != end ] || finish "$status" "the job ends with $status: $text (logs.sh)"
      ;;
  esac
  case ${since:+$reported} in
    *state=stopped*) [ "$running" != 0 ] || finish 130 'the job was stopped by hand; resume.sh goes on with it' ;;
  esac
  if [ "$running" = "$count" ]; then
    uneven=0
    since=${since:-$SECONDS} well=${well:-$SECONDS}
    pause "$opt_poll"
  elif [ "$running" != 0 ]; then
    uneven=$((uneven + 1)) # ending, or starting; or some died and the others wait for them
    if [ "$uneven" -gt 3 ]; then
      say 'some workers run and some do not; stops them all'
      end_job halt || trouble 'they cannot be stopped'
      uneven=0
    else
      pause "$opt_poll"
    fi
  else
    settle "$action $status"
  fi
}

# settle 'ACTION STATUS': no worker runs the job.
settle() {
  if ! printf '%s\n' "$reported" | grep -v 'state=exit code=0 ' >/dev/null; then
    finish 0 'the job has finished'
  fi
  case ${since:+$1/$reported} in
    'end 0/'*) ;; # some have finished, and some never started
    *'state=exit code='* | *state=lost*) fail --report="$reported" || return 0 ;;
  esac
  launch
}

while :; do
  if ! found=$(state 2>"$errors"); then
    unseen 'the state of the request is not known'
    continue
  fi
  case $found in
    absent) request ;;
    ACTIVE)
      if ! nodes=$(node_states 2>"$errors"); then
        unseen 'the state of the slices is not known'
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

# shellcheck shell=bash disable=SC2034
# What the scripts of this folder share: flags, their checks, quoting, and a way to show a command in place of running it.
#
# It is sourced. `settings "ACCEPTED FLAGS" "$@"` sets opt_FLAG for each of them, and job_args to what follows `--`.
# Flags that have values may come from the environment as well: --zone from JAXCL_TPU_ZONE. Works with bash 3.2 (macOS).

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
records=${JAXCL_TPU_RECORDS:-$HOME/.jaxcl/tpu} # arguments of jobs, for resume.sh
switches=' dry-run yes internal delete follow spot '
mounted=/mnt/runs # where worker.sh mounts --share
timer=$(command -v timeout || command -v gtimeout || true) # of coreutils; the second is its name in Homebrew
# ssh that may not read the terminal (see bounded) would wait for a passphrase: it fails at once, or asks a program for it.
export SSH_ASKPASS="${SSH_ASKPASS:-false}" SSH_ASKPASS_REQUIRE=force
unanswered='no answer within'
patience= # seconds; see queued
STOPPED=75 # exit status of a run that SIGTERM stopped (EX_TEMPFAIL of sysexits.h); see JAXCL_STOPPED in jaxcl/distributed.py

die() {
  printf '%s: error: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

say() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

# need TOOL REMEDY: unless commands are only shown.
need() {
  [ -n "${opt_dry_run:-}" ] || command -v "$1" >/dev/null 2>&1 || die "$1: not found on PATH; $2"
}

need_gcloud() {
  need gcloud 'install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install'
  want_timer
}

# want_timer: says once, for all the scripts that one calls, if nothing can end a call that hangs.
want_timer() {
  [ -z "$timer$opt_dry_run${JAXCL_TPU_UNTIMED:-}" ] || return 0
  say 'warning: timeout: not found on PATH (on macOS: brew install coreutils); a call that hangs is waited for without end'
  export JAXCL_TPU_UNTIMED=yes
}

# matches TEXT REGEX: ranges mean ASCII whatever the locale, and a newline never matches.
matches() {
  local LC_ALL=C
  [[ $1 =~ $2 ]]
}

# check FLAG REGEX WHAT: the value is given, and is one.
check() {
  local variable="opt_${1//-/_}"
  [ -n "${!variable}" ] || die "--$1: missing; write --$1=$3"
  matches "${!variable}" "^($2)\$" || die "--$1=$(printf %q "${!variable}"): not valid; write --$1=$3"
}

# check_if_given FLAG REGEX WHAT
check_if_given() {
  local variable="opt_${1//-/_}"
  [ -z "${!variable}" ] || check "$@"
}

# settings "FLAGS" ARG...
settings() {
  local accepted=" $1 help " flag value variable variables
  shift
  variables=$(printf %s "$accepted" | tr 'a-z-' 'A-Z_')
  for flag in $accepted; do
    variables=${variables# } && variable=JAXCL_TPU_${variables%% *} && variables=${variables#* }
    case $switches in *" $flag "*) value= ;; *) value=${!variable:-} ;; esac
    printf -v "opt_${flag//-/_}" %s "$value"
  done
  job_args=()
  has_job=
  while [ $# -gt 0 ]; do
    case $1 in
      --) has_job=yes && shift && job_args=(${1+"$@"}) && break ;;
      --?*) flag=${1#--} && flag=${flag%%=*} ;;
      -h) flag=help ;;
      *) die "$(printf %q "$1"): not a flag; what the job is given follows --" ;;
    esac
    case $accepted in *" $flag "*) ;; *) die "--$flag: not a flag of this command; choose from:$accepted" ;; esac
    [ "$flag" != help ] || { sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0; }
    case $switches in
      *" $flag "*)
        [ "$1" = "--$flag" ] || die "--$flag: takes no value"
        value=yes
        ;;
      *)
        case $1 in
          *=?*) value=${1#*=} ;;
          *=*) die "--$flag=: empty; write --$flag=VALUE" ;;
          *) die "--$flag: write --$flag=VALUE" ;;
        esac
        ;;
    esac
    printf -v "opt_${flag//-/_}" %s "$value"
    shift
  done
}

# no_job: nothing follows `--`, of which this command would do nothing.
no_job() {
  [ -z "$has_job" ] || die '--: this command is given no job; run.sh, babysit.sh and gke.sh apply are'
}

# Seconds that calls of the cloud may take; 0: without end.
#   --limit        calls that look (default 120); five times that to look at workers, by ssh
#   --limit-long   calls that do something: requests, copies, installs, ssh (default 1800)
limits='limit limit-long'
check_limits() {
  opt_limit=${opt_limit:-120} opt_limit_long=${opt_limit_long:-1800}
  check limit '0|[1-9][0-9]{0,5}' 'SECONDS, or 0: no limit'
  check limit-long '0|[1-9][0-9]{0,5}' 'SECONDS, or 0: no limit'
}

# The flags that all scripts for Cloud TPU take, checked: check_cloud [job]; without the word, no job may follow `--`.
cloud="name zone project nodes job internal dry-run $limits"
check_cloud() {
  [ -n "${1:-}" ] || no_job
  check_limits
  opt_nodes=${opt_nodes:-1} opt_job=${opt_job:-main}
  check name '[a-z]([a-z0-9-]{0,48}[a-z0-9])?' 'NAME (small letters, digits and dashes)'
  check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' 'ZONE, such as us-east5-b'
  check project '([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]' PROJECT_ID
  check nodes '[1-9][0-9]{0,3}' 'N, the number of slices'
  check job '[A-Za-z0-9][A-Za-z0-9_.-]{0,63}' 'JOB (letters, digits, dots, dashes)'
  passed=(--name="$opt_name" --zone="$opt_zone" --project="$opt_project" --nodes="$opt_nodes" --job="$opt_job")
  passed+=(--limit="$opt_limit" --limit-long="$opt_limit_long")
  [ -z "$opt_internal" ] || passed+=(--internal)
  [ -z "$opt_dry_run" ] || passed+=(--dry-run)
}

# check_share: a host and a folder, which neither mount nor ssh can take for a flag or a bucket.
check_share() {
  check_if_given share '[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?:/([A-Za-z0-9_.-][A-Za-z0-9_./-]*)?' 'HOST:/FOLDER, of NFS'
}

# show COMMAND ARG...: as a shell would need it typed.
show() {
  local line
  printf -v line ' %q' "$@"
  printf '%s\n' "${line# }"
}

# call COMMAND ARG...: runs it without the caller's input, or shows it under --dry-run.
call() {
  if [ -n "${opt_dry_run:-}" ]; then show "$@"; else "$@" </dev/null; fi
}

# within SECONDS COMMAND ARG...: as call, ended when it takes longer.
within() {
  local most=$1
  shift
  if [ -n "${opt_dry_run:-}" ]; then show "$@"; else bounded "$most" "$@" </dev/null; fi
}

# bounded SECONDS COMMAND ARG...: runs it; when its time is over, ends it with all that it started, says so and returns 124.
# For that it gets a process group of its own, which neither reads the terminal nor hears Ctrl-C: signals are handed on.
bounded() {
  local most=$1 began=$SECONDS code=0 child signal
  shift
  if [ "$most" = 0 ] || [ -z "$timer" ]; then
    "$@"
    return
  fi
  "$timer" -k 10 "$most" "$@" <&0 &
  child=$!
  for signal in INT TERM HUP; do
    # shellcheck disable=SC2064 # the child of now
    trap "kill $child 2>/dev/null; trap - $signal; sh -c 'kill -$signal \$PPID'" "$signal" # itself, also in a subshell
  done
  wait "$child" || code=$?
  trap - INT TERM HUP
  case $code in
    124 | 137)
      if [ $((SECONDS - began)) -ge "$most" ]; then
        say "${*:1:5}: $unanswered $most s, ended (--limit, --limit-long)"
        code=124
      fi
      ;;
  esac
  return "$code"
}

# quoted ARG...: one line for a remote shell. Single quotes alone: what printf %q writes for a newline only bash reads.
quoted() {
  local word rest out=
  for word in "$@"; do
    rest=$word word=
    while [ "$rest" != "${rest#*\'}" ]; do
      word="$word${rest%%\'*}'\\''"
      rest=${rest#*\'}
    done
    out="$out '$word$rest'"
  done
  printf '%s' "${out# }"
}

# queued VERB ARG...: a command on the queued resource. --quiet answers no question: there is nobody to ask.
# A caller that knows how long it may take sets `patience`.
queued() {
  local verb=$1 most=$opt_limit_long
  shift
  [ "$verb" != describe ] || most=$opt_limit
  within "${patience:-$most}" gcloud compute tpus queued-resources "$verb" ${1+"$@"} \
    --zone="$opt_zone" --project="$opt_project" --quiet
}

# on_workers COMMAND [WORKER] [NODE]: on every worker of every slice, unless told otherwise.
on_workers() {
  local route=()
  [ -z "$opt_internal" ] || route=(--tunnel-through-iap)
  queued ssh "$opt_name" --worker="${2:-all}" --node="${3:-all}" ${route[@]+"${route[@]}"} --command="$1"
}

# worker VERB ARG...: the command line that runs worker.sh there.
worker() { printf 'bash jaxcl/tpu/worker.sh %s' "$(quoted "$@")"; }

# end_job VERB [SECONDS]: halt or stop of worker.sh, which gives the job that long to save.
end_job() {
  local patience=$opt_limit_long
  [ "$patience" = 0 ] || patience=$((patience + 10#${2:-300}))
  on_workers "$(worker "$1" "$opt_job" ${2:+"$2"})"
}

# report: a line of every worker about the job, `jaxcl job=JOB host=HOST args=SUM state=STATE [code=CODE]`.
report() {
  local patience=$((opt_limit * 5))
  on_workers "if [ -f jaxcl/tpu/worker.sh ]; then $(worker status "$opt_job"); else echo jaxcl state=bare; fi"
}

# brief FILE: of what gcloud writes when it fails, the first line, what it calls an error, and the end.
brief() {
  awk 'NF { line[++n] = $0 }
    END { for (i = 1; i <= n; i++) if (i == 1 || i > n - 3 || line[i] ~ /^ERROR/) print line[i] }' "$1"
}

# state: that of the queued resource, or `absent`. Fails if it cannot be known.
state() {
  local found error
  error=$(mktemp)
  if found=$(queued describe "$opt_name" --format='value(state.state)' 2>"$error"); then
    rm -f "$error"
    printf '%s\n' "$found"
  elif grep -q -e NOT_FOUND -e 'was not found' "$error"; then
    rm -f "$error"
    printf 'absent\n'
  else
    brief "$error" >&2
    rm -f "$error"
    return 1
  fi
}

# node_names: one a line. The service numbers the slices of a request for several.
node_names() {
  local i
  if [ "$opt_nodes" = 1 ]; then printf '%s\n' "$opt_name" && return; fi
  for ((i = 0; i < opt_nodes; i++)); do printf '%s-%s\n' "$opt_name" "$i"; done
}

# node_states: `STATE<tab>WORKERS` of every slice, one a line; the state alone can be missing from a queued resource.
node_states() {
  local node
  for node in $(node_names); do
    within "$opt_limit" gcloud compute tpus tpu-vm describe "$node" --format='value(state,networkEndpoints.len())' \
      --zone="$opt_zone" --project="$opt_project" --quiet || return
  done
}

record() { printf '%s/%s.%s' "$records" "$opt_name" "$opt_job"; }

# remember: keeps job_args; private, as they may hold what is nobody's business.
remember() {
  [ -z "$opt_dry_run" ] || return 0
  (umask 077 && mkdir -p "$records" && printf '%s\0' "${job_args[@]}" >"$(record).new" && mv "$(record).new" "$(record)")
}

# recall: job_args as they were.
recall() {
  [ -f "$(record)" ] || die "job $opt_job of $opt_name: not known here; start it with run.sh"
  local word
  job_args=()
  while IFS= read -r -d '' word; do job_args+=("$word"); done <"$(record)"
}

# check_job [SHARE]: job_args are those of a run that outlives the machine. SHARE is what will be mounted, if that is known.
check_job() {
  local word workdir=
  for word in ${job_args[@]+"${job_args[@]}"}; do
    case $word in
      --workdir=* | -workdir=*) workdir=${word#*=} ;; # the last counts
      --workdir | -workdir) die "the job: $word and its value are two words; write --workdir=$mounted/NAME" ;;
    esac
  done
  [ -n "$workdir" ] || die "the job: has no --workdir; write -- --config=FILE --workdir=$mounted/NAME"
  case $workdir in
    *://*) die "--workdir=$workdir: a run is kept in a folder; mount the storage (setup.sh --share) and name the folder" ;;
    /*/../* | /*/.. | /..*) say "warning: --workdir=$workdir may lie anywhere; write $mounted/NAME, without .." ;;
    "$mounted" | "$mounted"/*)
      [ -n "${1-unknown}" ] || say "warning: --workdir=$workdir is on the disk of a TPU VM, which goes with it, without --share"
      ;;
    /*) say "warning: --workdir=$workdir is not below $mounted, where --share is mounted; a TPU VM takes its own disk along" ;;
    *) say "warning: --workdir=$workdir is on the disk of a TPU VM, which goes with it; see README.md on storage" ;;
  esac
}

# confirm WHAT [MORE]: asks for the name, unless --yes.
confirm() {
  local answer
  [ -z "$opt_yes$opt_dry_run" ] || return 0
  [ -t 0 ] || die "$1 needs --yes when there is nobody to ask"
  printf '%s. Type its name to go on: ' "$1${2:+; $2}" >&2
  read -r answer
  [ "$answer" = "$opt_name" ] || die 'not confirmed; nothing was done'
}

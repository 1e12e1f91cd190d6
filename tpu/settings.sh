# shellcheck shell=bash disable=SC2034
# What the scripts of this folder share: flags, their checks, quoting, and a way to show a command in place of running it.
#
# It is sourced. `settings "ACCEPTED FLAGS" "$@"` sets opt_FLAG for each of them, and job_args to what follows `--`.
# Flags that have values may come from the environment as well: --zone from JAXCL_TPU_ZONE. Works with bash 3.2 (macOS).

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
records=${JAXCL_TPU_RECORDS:-$HOME/.jaxcl/tpu} # arguments of jobs, for resume.sh
switches=' dry-run yes internal delete follow spot '
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

need_gcloud() { need gcloud 'install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install'; }

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
        case $1 in *=*) value=${1#*=} ;; *) die "--$flag: write --$flag=VALUE" ;; esac
        ;;
    esac
    printf -v "opt_${flag//-/_}" %s "$value"
    shift
  done
}

# The flags that all scripts for Cloud TPU take, checked.
cloud='name zone project nodes job internal dry-run'
check_cloud() {
  opt_nodes=${opt_nodes:-1} opt_job=${opt_job:-main}
  check name '[a-z]([a-z0-9-]{0,48}[a-z0-9])?' 'NAME (small letters, digits and dashes)'
  check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' 'ZONE, such as us-east5-b'
  check project '([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]' PROJECT_ID
  check nodes '[1-9][0-9]{0,3}' 'N, the number of slices'
  check job '[A-Za-z0-9][A-Za-z0-9_.-]{0,63}' 'JOB (letters, digits, dots, dashes)'
  passed=(--name="$opt_name" --zone="$opt_zone" --project="$opt_project" --nodes="$opt_nodes" --job="$opt_job")
  [ -z "$opt_internal" ] || passed+=(--internal)
  [ -z "$opt_dry_run" ] || passed+=(--dry-run)
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
queued() {
  local verb=$1
  shift
  call gcloud compute tpus queued-resources "$verb" ${1+"$@"} --zone="$opt_zone" --project="$opt_project" --quiet
}

# on_workers COMMAND [WORKER] [NODE]: on every worker of every slice, unless told otherwise.
on_workers() {
  local route=()
  [ -z "$opt_internal" ] || route=(--tunnel-through-iap)
  queued ssh "$opt_name" --worker="${2:-all}" --node="${3:-all}" ${route[@]+"${route[@]}"} --command="$1"
}

# worker VERB ARG...: the command line that runs worker.sh there.
worker() { printf 'bash jaxcl/tpu/worker.sh %s' "$(quoted "$@")"; }

# report: a line of every worker about the job, `jaxcl job=JOB host=HOST args=SUM state=STATE [code=CODE]`.
report() {
  on_workers "if [ -f jaxcl/tpu/worker.sh ]; then $(worker status "$opt_job"); else echo jaxcl state=bare; fi"
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
    tail -n 3 "$error" >&2
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
    call gcloud compute tpus tpu-vm describe "$node" --format='value(state,networkEndpoints.len())' \
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

# check_job: job_args are those of a run that outlives the machine.
check_job() {
  local word workdir=
  for word in ${job_args[@]+"${job_args[@]}"}; do
    case $word in --workdir=*) workdir=${word#*=} ;; esac
  done
  [ -n "$workdir" ] || die 'the job: has no --workdir; write -- --config=FILE --workdir=/mnt/runs/NAME'
  case $workdir in
    *://*) die "--workdir=$workdir: a run is kept in a folder; mount the storage (setup.sh --share) and name the folder" ;;
    /*) ;;
    *) say "warning: --workdir=$workdir is on the disk of a TPU VM, which goes with it; see README.md on storage" ;;
  esac
}

# confirm WHAT: asks for the name, unless --yes.
confirm() {
  local answer
  [ -z "$opt_yes$opt_dry_run" ] || return 0
  [ -t 0 ] || die "$1 needs --yes when there is nobody to ask"
  printf '%s. Type its name to go on: ' "$1" >&2
  read -r answer
  [ "$answer" = "$opt_name" ] || die 'not confirmed; nothing was done'
}

#!/usr/bin/env bash
# Runs a job on the TPU slices of a GKE cluster (JobSet installed):
#   gke.sh apply --name=NAME --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 --claim=runs \
#     [--context=CONTEXT] [FLAGS of jobset.py] -- --config=FILE --workdir=/mnt/runs/NAME
#   gke.sh status|logs|delete --name=NAME [--namespace=default] [--context=CONTEXT] [--yes]
#   --limit   seconds after which status is given up (default 120); --limit-long: the other calls (default 1800). 0: never
# The same apply after delete continues the run. --dry-run shows the manifest, or the command. delete asks, unless --yes.

set -euo pipefail
. "$(dirname "$0")/settings.sh"

verb=${1:-}
case $verb in
  apply | status | logs | delete) shift ;;
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
  *) die 'say what to do: apply, status, logs or delete' ;;
esac
settings "$limits"' name namespace context yes dry-run image accelerator topology chips slices claim mount service-account spot restarts grace python' "$@"
opt_namespace=${opt_namespace:-default}
check name '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' 'NAME (small letters, digits and dashes, at most 40)'
check namespace '[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?' NAMESPACE
check_if_given context '[A-Za-z0-9][A-Za-z0-9._:/@-]{0,252}' 'CONTEXT, one that kubectl config get-contexts names'
check_limits
[ "$verb" = apply ] || no_job
need kubectl 'install it: gcloud components install kubectl gke-gcloud-auth-plugin'
want_timer
kube=(kubectl ${opt_context:+--context="$opt_context"} --namespace="$opt_namespace")
mine=jobset.sigs.k8s.io/jobset-name=$opt_name

case $verb in
  apply)
    command -v python3 >/dev/null 2>&1 || die 'python3: not found on PATH; install it'
    flags=(--name="$opt_name" --namespace="$opt_namespace" ${opt_spot:+--spot})
    for flag in image accelerator topology chips slices claim mount service-account restarts grace python; do
      variable="opt_${flag//-/_}"
      [ -z "${!variable}" ] || flags+=(--"$flag=${!variable}")
    done
    manifest=$(python3 "$here/jobset.py" "${flags[@]}" -- ${job_args[@]+"${job_args[@]}"}) || exit 2
    if [ -n "$opt_dry_run" ]; then
      printf '# %s\n%s\n' "$(show "${kube[@]}" apply --filename=-)" "$manifest"
    else
      printf '%s\n' "$manifest" | bounded "$opt_limit_long" "${kube[@]}" apply --filename=-
    fi
    ;;
  status)
    within "$opt_limit" "${kube[@]}" get jobset "$opt_name"
    within "$opt_limit" "${kube[@]}" get pods --selector="$mine" --output=wide
    ;;
  logs)
    within "$opt_limit_long" "${kube[@]}" logs --selector="$mine" --container=jaxcl --prefix --tail=100 \
      --max-log-requests=1000
    ;;
  delete)
    confirm "deleting the JobSet $opt_name of $opt_namespace" 'its run is saved and stays on the claim'
    within "$opt_limit_long" "${kube[@]}" delete jobset "$opt_name"
    ;;
esac

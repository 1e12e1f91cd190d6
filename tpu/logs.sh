#!/usr/bin/env bash
# Shows what a job writes: logs.sh --name=NAME --zone=ZONE --project=PROJECT [--job=JOB] [--worker=0] [--node=0]
#   --lines=100   how many
#   --follow      go on until Ctrl-C
#   --worker=all --node=all   of all workers

set -euo pipefail
. "$(dirname "$0")/settings.sh"

settings "$cloud worker node lines follow" "$@"
check_cloud
check_if_given worker 'all|[0-9]+' 'a number, or all'
check_if_given node 'all|[0-9]+' 'a number, or all'
check_if_given lines '[0-9]{1,7}' N
need_gcloud
[ -z "$opt_follow" ] || patience=0
on_workers "$(worker log "$opt_job" "${opt_lines:-100}" ${opt_follow:+follow})" "${opt_worker:-0}" "${opt_node:-0}"

#!/usr/bin/env bash
# Gives the slices back: delete.sh --name=NAME --zone=ZONE --project=PROJECT [--yes]
# Their disks go with them. It asks for the name first, unless --yes.

set -euo pipefail
. "$(dirname "$0")/settings.sh"

settings "$cloud yes" "$@"
check_cloud
need_gcloud
confirm "deleting $opt_name in $opt_zone of $opt_project and the disks of its machines"
queued delete "$opt_name" --force

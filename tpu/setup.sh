#!/usr/bin/env bash
# Installs this tree on every worker: setup.sh --name=NAME --zone=ZONE --project=PROJECT [--share=HOST:/FOLDER]
#   --share     NFS folder (Filestore) that all workers mount at /mnt/runs: where runs outlive the machines
#   --limit-long   seconds after which copying, or installing, is given up (default 1800 for each; 0: never)
#   --nodes, --internal as in create.sh; --dry-run shows the commands only
# A key with a passphrase must be in an agent, and any key with several workers: ssh-add ~/.ssh/google_compute_engine

set -euo pipefail
. "$(dirname "$0")/settings.sh"

settings "$cloud share" "$@"
check_cloud
check_share
need_gcloud
need tar 'install it'

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
call tar -czf "$scratch/jaxcl.tar.gz" -C "$root" --exclude=__pycache__ README.md LICENSE pyproject.toml jaxcl configs tpu
route=()
[ -z "$opt_internal" ] || route=(--tunnel-through-iap)
queued scp "$scratch/jaxcl.tar.gz" "$opt_name:jaxcl.tar.gz" --worker=all --node=all ${route[@]+"${route[@]}"}
unpack='rm -rf jaxcl.new && mkdir jaxcl.new && tar -xzf jaxcl.tar.gz -C jaxcl.new && bash jaxcl.new/tpu/worker.sh'
on_workers "$unpack $(quoted setup ${opt_share:+"$opt_share"})"

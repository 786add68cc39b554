#!/usr/bin/env bash
# Runs once on each node before the ranks start. Prints a line, "HOST: fit: …" or "HOST: unfit: …".
#   check_node.sh RUN [OPTIONS OF wsm_ds.training.node_check]
set -uo pipefail
exec 2>&1 # one stream keeps messages in their order

# A lock in this job's own folder is of an attempt that was killed while it compiled. torch would wait for it for ever.
if [ -d "${TORCH_EXTENSIONS_DIR:?}" ]; then
  find "$TORCH_EXTENSIONS_DIR" -name lock -delete
fi
if ! mkdir -p "$TORCH_EXTENSIONS_DIR" "${TRITON_CACHE_DIR:?}"; then
  echo "$(hostname): unfit: $TORCH_EXTENSIONS_DIR cannot be made"
  exit 3
fi
exec "$WSM_PYTHON" -m wsm_ds.training.node_check "$@"

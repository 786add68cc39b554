"""Beside a run: which windows its checkpoints complete, merging them, and which checkpoints nobody needs any more."""

from wsm_ds.watching.events import Event
from wsm_ds.watching.spec import WatchSpec, make_spec
from wsm_ds.watching.watcher import WatchOptions, watch
from wsm_ds.watching.windows import EndPoints

__all__ = ["EndPoints", "Event", "WatchOptions", "WatchSpec", "make_spec", "watch"]

"""Work beside a training run: merge windows as they become complete, and delete checkpoints that no window needs."""

from wsm_ds.watching.events import Event
from wsm_ds.watching.spec import WatchSpec, make_spec
from wsm_ds.watching.watcher import WatchOptions, watch
from wsm_ds.watching.windows import EndPoints

__all__ = ["EndPoints", "Event", "WatchOptions", "WatchSpec", "make_spec", "watch"]

"""Averages of the masters in a running engine: slot means, snapshots, and evaluation with an average without a file.

slots = SlotMeans(engine, "RUN", every=500)  # after deepspeed.initialize, and after a checkpoint is loaded
for batch in batches:
    loss = engine(batch)
    engine.backward(loss)
    engine.step()
    slots.update()  # acts once for each update; writes RUN/snapshots/global_stepN behind the next steps
with slots.swapped_in(last=8):
    evaluate(engine)  # the module computes with the merge; afterwards every bit is as before
slots.close()
"""

from wsm_ds.averaging.averages import Anchored, Ema
from wsm_ds.averaging.slot_means import SlotMeans
from wsm_ds.averaging.trainer_callback import trainer_callback

__all__ = ["Anchored", "Ema", "SlotMeans", "trainer_callback"]

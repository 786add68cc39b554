"""Slot means in a training of HF Trainer."""

from typing import Any

from wsm_ds.averaging.slot_means import SlotMeans


def trainer_callback(trainer: Any, *, every: int | None = None, sample: int = 1, device: str | None = None) -> Any:
    """Returns a TrainerCallback that writes slot means into OUTPUT_DIR/snapshots.

        trainer.add_callback(wsm_ds.averaging.trainer_callback(trainer))

    Each checkpoint that Trainer saves ends its slot, so a resumed training goes on as if nothing had happened.

    Args:
        trainer: HF's, with a DeepSpeed config.
        every: steps of a slot; None: as the ds_config says, `"wsm_ds": {"slot_every": N}`.
        sample: see `SlotMeans`.
        device: see `SlotMeans`.
    """
    from transformers import TrainerCallback

    class SlotMeansCallback(TrainerCallback):  # type: ignore[misc]
        """Calls `SlotMeans` at Trainer's events. `slots` is there from the begin of the training on."""

        slots: SlotMeans

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """The engine exists, and a checkpoint is loaded, only now."""
            self.slots = SlotMeans(trainer.model_wrapped, args.output_dir, every=every, sample=sample, device=device)

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """After each update, and after those that an overflow skipped."""
            self.slots.update()

        def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """At the step of the checkpoint."""
            self.slots.end_slot()

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """Waits for the last snapshot."""
            self.slots.close()

    return SlotMeansCallback()

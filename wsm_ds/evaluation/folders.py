"""The model in a folder: a merge's output, a checkpoint as DeepSpeed wrote it, or weights from elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from wsm_ds.errors import EvaluationError
from wsm_ds.evaluation.models import build_model, load_folder
from wsm_ds.evaluation.subjects import CONFIG, SAFETENSORS, checkpoint_in
from wsm_ds.layouts.frameworks import save_of

if TYPE_CHECKING:
    import torch


def model_of_folder(
    folder: Path, dtype: str, spec: str | None = None, device: "torch.device | str | None" = None
) -> "torch.nn.Module":
    """Makes a model and fills it with the weights in a folder.

    A DeepSpeed checkpoint needs no export: its masters are rounded to `dtype` on their way into the model.

    Args:
        folder: with *.safetensors, or a checkpoint (RUN/global_step4000), or a merge's output of any format.
        dtype: of the parameters: "bf16", "fp16" or "fp32".
        spec: as in `build_model`; None: the folder, or the folder of its framework's save, has a config.json.
        device: as in `build_model`.

    Raises:
        EvaluationError: there are no weights in the folder, or nothing says for which model they are.
        ModelMismatch: the weights do not fit the model.
        WsmError: the checkpoint cannot be read, see `load_merge`.
    """
    checkpoint = None if any(folder.glob(SAFETENSORS)) else checkpoint_in(folder)
    if checkpoint is None:
        return load_folder(folder, dtype, spec, device)
    from wsm_ds.loading import load_merge

    if spec is None:
        places = (folder, save_of(checkpoint.resolve()).folder)
        spec = next((str(place) for place in places if (place / CONFIG).is_file()), None)
    if spec is None:
        raise EvaluationError(f"{folder} is a DeepSpeed checkpoint without a {CONFIG}; say by `model` what it is of.")
    model = build_model(spec, dtype, device)
    load_merge(
        model, run=checkpoint.parent, tags=(checkpoint.name,), dtype=cast(Literal["bf16", "fp16", "fp32"], dtype)
    )
    return model

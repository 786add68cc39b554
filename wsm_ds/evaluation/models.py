"""Models to measure: made from a config or a function, and filled with the weights of a folder.

What a model must be. Either its forward takes `input_ids` (int64, shape [batch, length]) and returns logits, or an
object with `logits`, as models of the transformers library do. Or it has a method `loss(batch)`, which takes tokens of
shape [batch, length + 1] and returns nats: of shape [batch, length] each predicted token's, of shape [batch] each row's
mean, or one number, the mean of all.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsm_ds.dtypes import BY_NAME
from wsm_ds.errors import EvaluationError, ModelMismatch, few
from wsm_ds.evaluation.subjects import CONFIG, SAFETENSORS

if TYPE_CHECKING:
    import torch

NO_OTHER_CODE = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is fetched, and no code that lies beside the weights is run."""
NEEDED = "pip install 'wsm_ds[evaluate]'"


def default_device() -> "torch.device":
    """The accelerator of this rank (by LOCAL_RANK, or SLURM_LOCALID), or the CPU."""
    import torch

    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator().type
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    number = int(local_rank) if local_rank.isdecimal() else 0
    return torch.device(kind, number % torch.accelerator.device_count())


def torch_dtype(name: str) -> "torch.dtype":
    """torch's dtype for "bf16", "fp16" or "fp32"."""
    import torch

    dtype: torch.dtype = getattr(torch, BY_NAME[name].torch_name)
    return dtype


def build_model(spec: str, dtype: str, device: "torch.device | str | None" = None) -> "torch.nn.Module":
    """Makes a model whose weights are yet to be filled in.

    Args:
        spec: a config.json of the transformers library or a folder with one (the model is a causal language model), or
            `module:function`, or `file.py:function`. The function takes nothing and returns a torch module. Modules are
            also searched in the working directory.
        dtype: of the parameters: "bf16", "fp16" or "fp32".
        device: where the model lies; None: see `default_device`.

    Returns:
        The model, in evaluation mode. Parameters have arbitrary values.

    Raises:
        EvaluationError: there is no such config or function, or it makes no model; names it.
    """
    place = default_device() if device is None else device
    path = Path(spec)
    if path.suffix == ".py":
        raise EvaluationError(f"{spec} is a Python file. Name its function that makes the model, too: {spec}:FUNCTION.")
    if path.exists():
        model = _from_config(path, dtype, place)
    elif ":" in spec:
        model = _from_function(spec).to(device=place, dtype=torch_dtype(dtype))
    else:
        raise EvaluationError(f"the model {spec} is neither a folder, nor a config.json, nor MODULE:FUNCTION.")
    return model.eval()


def source_of(spec: str) -> Path | None:
    """The file that decides which model `build_model` makes, as far as one file does.

    Args:
        spec: as in `build_model`.

    Returns:
        The config.json, or the Python file of the function; None if it is not found.
    """
    path = Path(spec)
    if path.exists():
        return path if path.is_file() else path / CONFIG
    where = spec.rpartition(":")[0]
    if where.endswith(".py"):
        return Path(where)
    parts = where.split(".")
    places = [Path(folder).joinpath(*parts) for folder in (str(Path.cwd()), *sys.path)]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return next((file for file in files if file.is_file()), None)


def _from_config(path: Path, dtype: str, device: Any) -> Any:
    transformers = _transformers()
    import torch

    if not (path if path.is_file() else path / CONFIG).is_file():
        raise EvaluationError(f"{path} has no {CONFIG}. Give one that has, or MODULE:FUNCTION.")
    try:
        config = transformers.AutoConfig.from_pretrained(path, **NO_OTHER_CODE)
        with _no_initialization(), torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype))
        model.tie_weights()  # transformers ties at the end of the initialization that was left out
    except (OSError, ValueError, ImportError, AttributeError, TypeError) as error:
        raise EvaluationError(f"no model can be made from {path}: {error}") from error
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EvaluationError(f"a model from a config needs transformers: {NEEDED}.") from error
    return transformers


def _no_initialization() -> AbstractContextManager[None]:
    """Leaves out the random values of new parameters: they take longer than to read the real ones."""
    for module in ("transformers.initialization", "transformers.modeling_utils"):  # since version 5, and before
        try:
            context: AbstractContextManager[None] = importlib.import_module(module).no_init_weights()
        except (ImportError, AttributeError):
            continue
        return context
    return nullcontext()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from printing: what it would say of tensors that do not fit becomes an error."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _from_function(spec: str) -> Any:
    import torch

    where, _, name = spec.rpartition(":")
    try:
        module = _module_of_file(Path(where)) if where.endswith(".py") else _module(where)
        made = getattr(module, name)()
    except Exception as error:  # the user's code may raise anything
        raise EvaluationError(f"the model {spec} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(made, torch.nn.Module):
        raise EvaluationError(f"{spec} returned a {type(made).__name__}, and a torch.nn.Module is needed.")
    return made


def _module(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:  # a console script's path begins with the folder of the script
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _module_of_file(path: Path) -> Any:
    name = f"wsm_ds_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_folder(
    folder: Path, dtype: str, spec: str | None = None, device: "torch.device | str | None" = None
) -> "torch.nn.Module":
    """Makes the model whose weights a folder holds as safetensors.

    Args:
        folder: with *.safetensors; with a config.json too, if `spec` is None.
        dtype: of the parameters.
        spec: as in `build_model`; None: the folder.
        device: as in `build_model`.

    Raises:
        EvaluationError: there are no weights, or no config.
        ModelMismatch: the weights do not fit the model; names tensors.
    """
    if not any(folder.glob(SAFETENSORS)):
        raise EvaluationError(f"{folder} has no *.safetensors.")
    if spec is not None:
        model = build_model(spec, dtype, device)
        _fill(model, folder)
        return model
    if not (folder / CONFIG).is_file():
        raise EvaluationError(f"{folder} has no {CONFIG}; say by `model` what the weights are for.")
    options = NO_OTHER_CODE | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _quiet():
            model, report = _transformers().AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch_dtype(dtype), **options
            )
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, TypeError, KeyError) as error:
        raise EvaluationError(f"{folder} cannot be loaded: {error}") from error
    mismatched = [item[0] if isinstance(item, tuple) else item for item in report.get("mismatched_keys", ())]
    _require_fit(folder, list(report["missing_keys"]), list(report["unexpected_keys"]), mismatched)
    return model.to(default_device() if device is None else device).eval()


def _fill(model: Any, folder: Path) -> None:
    """Copies the tensors of safetensors files into a model, one after the other."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise EvaluationError(f"weights in safetensors need the package safetensors: {NEEDED}.") from error
    import torch

    places = inner(model).state_dict(keep_vars=True)
    filled, surplus, mismatched = set(), [], []
    for path in sorted(folder.glob(SAFETENSORS)):
        try:
            with safe_open(path, "pt") as file, torch.no_grad():
                for name in file.keys():  # noqa: SIM118  it is no mapping
                    tensor = file.get_tensor(name)
                    if name not in places:
                        surplus.append(name)
                    elif places[name].shape != tensor.shape:
                        mismatched.append(name)
                    else:
                        places[name].copy_(tensor)
                        filled.add(places[name].data_ptr())
        except (OSError, SafetensorError) as error:
            raise EvaluationError(f"{path} cannot be read: {error}") from error
    # A tied parameter is filled under its other name.
    missing = [name for name, place in places.items() if place.data_ptr() not in filled and place.numel()]
    _require_fit(folder, missing, surplus, mismatched)


def _require_fit(folder: Path, missing: list[str], surplus: list[str], mismatched: list[str]) -> None:
    faults = [
        f"{what}: {few(sorted(names))}"
        for what, names in (
            ("the model has, and the folder lacks", missing),
            ("the folder has, and the model lacks", surplus),
            ("other shapes have", mismatched),
        )
        if names
    ]
    if faults:
        raise ModelMismatch(f"the weights in {folder} do not fit the model; {'; '.join(faults)}.")


def inner(model: Any) -> Any:
    """The model that DeepSpeed's inference engine wraps; any other model itself.

    Such an engine has a forward of any arguments, no config, and other names of tensors than its model.
    """
    is_engine = type(model).__name__ == "InferenceEngine" and type(model).__module__.startswith("deepspeed.")
    return model.module if is_engine else model


def vocabulary_of(model: Any) -> int | None:
    """The number of tokens that a model knows, where it says so."""
    size = getattr(getattr(inner(model), "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None


def positions_of(model: Any) -> int | None:
    """The longest sequence of a model, where it says so."""
    size = getattr(getattr(inner(model), "config", None), "max_position_embeddings", None)
    return size if isinstance(size, int) and size > 0 else None

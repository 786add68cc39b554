"""The globals that a checkpoint's pickle may name: each by its full name, and only in the way that `pickle` writes it.

An output's pickle is mostly the newest checkpoint's, byte for byte, and whoever loads it with `weights_only=False` runs
it. So a name is here only if nothing that a pickle can do with it runs other code: constructors of plain data, classes
whose objects get their attributes from the pickle, and types that are mentioned as values. The names come from
pickling such objects with torch 2.13, numpy 1.26 and 2.4, DeepSpeed 0.14 to 0.19, transformers 5, Accelerate 1.15,
Lightning 2.6, PEFT 0.21 and OmegaConf 2.4, and from Megatron-DeepSpeed's source. A user allows others by name.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def _names(table: Mapping[str, str]) -> frozenset[str]:
    """Full names, from modules and the names in them."""
    return frozenset(f"{module}.{name}" for module, names in table.items() for name in names.split())


def _in_all(modules: Iterable[str], names: str) -> dict[str, str]:
    return dict.fromkeys(modules, names)


_NUMPY_CORE = ("numpy.core", "numpy._core")
_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")
_FABRIC = ("lightning.fabric", "lightning_fabric")
_CONTAINERS = "list dict tuple set frozenset"

CONTAINERS = _names(_in_all(("builtins", "__builtin__"), _CONTAINERS + " float int long str unicode bool")) | _names(
    {"collections": "OrderedDict Counter deque"}
)
"""Types that may make the missing values of a `defaultdict`."""

ENUMS = _names(
    {
        "http": "HTTPStatus",
        "signal": "Signals",
        "uuid": "SafeUUID",
        "deepspeed.runtime.config": "DtypeEnum",
        "deepspeed.runtime.fp16.loss_scaler": "LossScaleProfile",
        "deepspeed.runtime.zero.config": "ZeroStageEnum",
        "deepspeed.runtime.zero.offload_config": "OffloadDeviceEnum OffloadStateTypeEnum",
        "deepspeed.runtime.zero.partition_parameters": "ZeroParamStatus ZeroParamType",
        "megatron.core.enums": "Fp8Recipe ModelType",
        "megatron.core.transformer.enums": "AttnBackend AttnMaskType AttnType CudaGraphScope LayerType ModelType",
        **_in_all(("megatron.model.enums", "megatron.legacy.model.enums"), "AttnMaskType AttnType LayerType ModelType"),
        "megatron.enums": "AttnMaskType AttnType LayerType ModelType PositionEmbeddingType",
        "transformers.debug_utils": "DebugOption",
        "transformers.trainer_utils": "EvaluationStrategy FSDPOption HPSearchBackend HubStrategy IntervalStrategy "
        "SaveStrategy SchedulerType",
        "transformers.training_args": "OptimizerNames ParallelMode",
        "transformers.utils.generic": "PaddingStrategy TensorType",
        "accelerate.utils.dataclasses": "ComputeEnvironment CustomDtype DDPCommunicationHookType DistributedType "
        "DynamoBackend FP8BackendType LoggerType PrecisionType RNGType SageMakerDistributedType",
        "peft.utils.peft_types": "PeftType TaskType",
        "peft.tuners.multitask_prompt_tuning.config": "MultitaskPromptTuningInit",
        "peft.tuners.p_tuning.config": "PromptEncoderReparameterizationType",
        "peft.tuners.prompt_tuning.config": "PromptTuningInit",
        **_in_all([f"{root}.trainer.states" for root in _LIGHTNING], "RunningStage TrainerFn TrainerStatus"),
        **_in_all([f"{root}.utilities.enums" for root in _LIGHTNING], "GradClipAlgorithmType"),
    }
)
"""Enumerations. A member is written as a call with its value; Python 3.11.0 to 3.11.3 write `getattr(class, name)`."""

CALLED = ENUMS | _names(
    {
        "builtins": _CONTAINERS + " float int str bool bytes bytearray complex slice range object",
        # torch.save writes protocol 2, with Python 2's names (`Lib/_compat_pickle.py`, REVERSE_NAME_MAPPING).
        "__builtin__": _CONTAINERS + " float int long str unicode bool bytes bytearray complex slice xrange object",
        "argparse": "Namespace",
        "array": "array",
        "collections": "Counter deque",
        "datetime": "datetime date time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "random": "Random",
        "time": "struct_time",
        "types": "SimpleNamespace GenericAlias",
        "uuid": "UUID",
        "zoneinfo": "ZoneInfo ZoneInfo._unpickle",
        # pathlib._local: Python 3.13.
        **_in_all(
            ("pathlib", "pathlib._local"),
            "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        ),
        "numpy": "dtype ndarray recarray record",
        "numpy.rec": "recarray",
        **_in_all([f"{core}.multiarray" for core in _NUMPY_CORE], "_reconstruct scalar"),
        "numpy.random._pickle": "__bit_generator_ctor",
        "numpy.random._mt19937": "MT19937",
        "numpy.random._pcg64": "PCG64 PCG64DXSM",
        "numpy.random._philox": "Philox",
        "numpy.random._sfc64": "SFC64",
        "numpy.random.bit_generator": "SeedSequence __pyx_unpickle_SeedSequence",
        "torch": "Tensor device",
        "torch._C": "Generator",
        "torch.nn.parameter": "Buffer Parameter",
        "torch._utils": "_rebuild_tensor _rebuild_sparse_tensor _rebuild_nested_tensor _rebuild_qtensor "
        "_rebuild_meta_tensor_no_storage _rebuild_wrapper_subclass _rebuild_parameter_with_state "
        "_rebuild_device_tensor_from_numpy _rebuild_device_tensor_from_cpu_tensor",
        "torch.serialization": "_get_layout",
        "torch.torch_version": "TorchVersion",
    }
)
"""What a pickle may call (opcode REDUCE), make (NEWOBJ) or mention."""

MADE = _names(
    {
        "_io": "BytesIO",  # extra states of modules (`get_extra_state`)
        "deepspeed.checkpoint.universal_checkpoint": "SubparamShape",
        "deepspeed.runtime.fp16.loss_scaler": "DynamicLossScaler LossScaler",
        # bf16_optimizer.py sets the name in its own module; older checkpoints name it there.
        **_in_all(
            (
                "deepspeed.utils.tensor_fragment",
                "deepspeed.utils.mixed_precision_linkage",
                "deepspeed.runtime.bf16_optimizer",
                "deepspeed.runtime.zero.stage_1_and_2",
            ),
            "fragment_address",
        ),
        "transformers.integrations.deepspeed": "HfDeepSpeedConfig HfTrainerDeepSpeedConfig",
        "transformers.trainer_callback": "TrainerState",
        "transformers.trainer_pt_utils": "AcceleratorConfig",
        "transformers.training_args": "TrainingArguments",
        "accelerate.state": "PartialState",
        "accelerate.utils.dataclasses": "DeepSpeedPlugin",
        **_in_all([f"{root}.utilities.parsing" for root in _LIGHTNING], "AttributeDict"),
        **_in_all([f"{root}.utilities.data" for root in _FABRIC], "AttributeDict"),
        "omegaconf.base": "ContainerMetadata Metadata UnionNode",
        "omegaconf.dictconfig": "DictConfig",
        "omegaconf.listconfig": "ListConfig",
        "omegaconf.nodes": "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode InterpolationResultNode "
        "LiteralNode NoneNode PathNode StringNode",
        "peft.tuners.lora.config": "ArrowConfig CordaConfig EvaConfig LoftQConfig LoraConfig LoraRuntimeConfig",
        **{
            f"peft.tuners.{method}.config": f"{name}Config"
            for method, name in {
                "adalora": "AdaLora",
                "adaption_prompt": "AdaptionPrompt",
                "boft": "BOFT",
                "bone": "Bone",
                "c3a": "C3A",
                "delora": "Delora",
                "fourierft": "FourierFT",
                "hra": "HRA",
                "ia3": "IA3",
                "ln_tuning": "LNTuning",
                "loha": "LoHa",
                "lokr": "LoKr",
                "miss": "Miss",
                "multitask_prompt_tuning": "MultitaskPromptTuning",
                "oft": "OFT",
                "osf": "OSF",
                "p_tuning": "PromptEncoder",
                "poly": "Poly",
                "prefix_tuning": "PrefixTuning",
                "prompt_tuning": "PromptTuning",
                "randlora": "RandLora",
                "road": "Road",
                "shira": "Shira",
                "trainable_tokens": "TrainableTokens",
                "vblora": "VBLoRA",
                "vera": "Vera",
                "waveft": "WaveFT",
                "xlora": "XLora",
            }.items()
        },
    }
)
"""Classes whose objects are made empty (NEWOBJ) and get their attributes from the pickle. Their constructors, which may
read files or start a process group, may not be called."""

MENTIONED = _names(
    {
        "__builtin__": "Ellipsis NotImplemented",
        "builtins": "Ellipsis NotImplemented",
        "numpy": "bool bool_ bytes_ complex64 complex128 datetime64 float16 float32 float64 int8 int16 int32 int64 "
        "longlong object_ str_ timedelta64 uint8 uint16 uint32 uint64 ulonglong",
        "torch": "bfloat16 bool complex32 complex64 complex128 float16 float32 float64 float8_e4m3fn float8_e4m3fnuz "
        "float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
        "qint8 qint32 quint8 quint4x2 quint2x4 "
        "per_tensor_affine per_channel_affine per_channel_affine_float_qparams per_tensor_symmetric "
        "per_channel_symmetric "
        "DoubleStorage FloatStorage HalfStorage BFloat16Storage LongStorage IntStorage ShortStorage CharStorage "
        "ByteStorage BoolStorage ComplexFloatStorage ComplexDoubleStorage QInt8Storage QInt32Storage QUInt8Storage "
        "QUInt4x2Storage QUInt2x4Storage UntypedStorage",
        "torch.storage": "UntypedStorage",
        "typing": "Any Dict List Literal Mapping Optional Sequence Set Tuple Union",
    }
)
"""Types and constants that are values. They may not be called."""


def _encodes_bytes(arguments: tuple[Any, ...]) -> bool:
    """`bytes`, which protocol 2 writes as a text of the same code points."""
    return len(arguments) == 2 and type(arguments[0]) is str and arguments[1] in ("latin1", "latin-1")


def _is_type_of_none(arguments: tuple[Any, ...]) -> bool:
    """`NoneType`, which is written as `type(None)`."""
    return arguments == (None,)


def _is_generic(arguments: tuple[Any, ...]) -> bool:
    """A type such as `Dict[str, int]`, which is written as `getitem(Dict, (str, int))`."""
    return len(arguments) == 2 and _full_name(arguments[0]).startswith("typing.")


def _makes_containers(arguments: tuple[Any, ...]) -> bool:
    """A `defaultdict` with a factory that makes plain data. It is called whenever a key is missing."""
    return not arguments or (len(arguments) == 1 and (arguments[0] is None or _full_name(arguments[0]) in CONTAINERS))


def _has_bit_generator(arguments: tuple[Any, ...]) -> bool:
    """A `numpy.random.Generator` or `RandomState`, whose second argument is a function that is called."""
    constructor = "numpy.random._pickle.__bit_generator_ctor"
    return len(arguments) < 2 or (len(arguments) == 2 and _full_name(arguments[1]) == constructor)


def _full_name(value: Any) -> str:
    """Full name of a stand-in class; that of an OrderedDict; "" for anything else."""
    return str(getattr(value, "global_", f"{value.__module__}.{value.__name__}" if isinstance(value, type) else ""))


CHECKED: dict[str, Callable[[tuple[Any, ...]], bool]] = {
    "_codecs.encode": _encodes_bytes,
    "_operator.getitem": _is_generic,
    "collections.defaultdict": _makes_containers,
    "numpy.random._pickle.__generator_ctor": _has_bit_generator,
    "numpy.random._pickle.__randomstate_ctor": _has_bit_generator,
    **dict.fromkeys(("builtins.type", "__builtin__.type"), _is_type_of_none),
}
"""What a pickle may call only with arguments that the function here accepts; and may not mention otherwise."""
GETATTR = ("builtins.getattr", "__builtin__.getattr")
"""How protocol 2 names what is inside a class."""

TENSOR_FUNCTIONS = frozenset(name for name in CALLED if name.startswith("torch._utils._rebuild"))
"""What `torch._tensor._rebuild_from_type_v2` may call, beside the functions of `unpickle`."""
KNOWN = CALLED | MADE | MENTIONED | set(CHECKED) | set(GETATTR)

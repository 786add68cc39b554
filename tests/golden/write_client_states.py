"""Writes client_states/*.pt: what programs keep in DeepSpeed's client state, from packages that the tests lack.

python tests/golden/write_client_states.py   # with omegaconf 2.4.0, peft 0.21.2, lightning 2.6.6, torch 2.13.0
"""

import dataclasses
import pathlib
import typing
from http import HTTPStatus
from importlib import import_module
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("client_states")


def omegaconf_values() -> typing.Any:
    """A configuration with nodes of every type, some typed by a dataclass's fields."""
    omegaconf = import_module("omegaconf")
    plain = omegaconf.OmegaConf.create(
        {"lr": 0.1, "on": True, "names": ["a", 1, None], "data": {"path": pathlib.Path("/data"), "again": "${lr}"}}
    )
    typed = dataclasses.make_dataclass(
        "Typed",
        [
            ("steps", int, 1),
            ("name", str, "x"),
            ("rate", float, 0.5),
            ("maybe", typing.Optional[int], None),  # noqa: UP045 - OmegaConf keeps this form
            ("where", Path, Path()),
            ("raw", bytes, b"x"),
            ("sizes", dict[str, float], dataclasses.field(default_factory=dict)),
        ],
    )
    nodes = omegaconf.OmegaConf.structured(typed)
    fields = {field.name: nodes._get_node(field.name) for field in dataclasses.fields(typed)}
    for node in fields.values():
        node._set_parent(None)
    return {"plain": plain, "fields": fields, "enum": omegaconf.EnumNode(HTTPStatus, HTTPStatus.OK)}


def peft_values() -> typing.Any:
    """Configurations of the methods that need no further package."""
    peft = import_module("peft")
    names = ("LoraConfig", "IA3Config", "PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig", "OFTConfig")
    return [getattr(peft, name)(task_type="CAUSAL_LM") for name in names]


def lightning_values() -> typing.Any:
    """`save_hyperparameters` in both of Lightning's packages, and its states."""
    modules = (
        "lightning.fabric.utilities.data",
        "lightning.pytorch.utilities.parsing",
        "pytorch_lightning.utilities.parsing",
    )
    hyperparameters = [import_module(module).AttributeDict(lr=0.1) for module in modules]
    return [*hyperparameters, import_module("lightning.pytorch.trainer.states").RunningStage.TRAINING]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for make in (omegaconf_values, peft_values, lightning_values):
        torch.save({"client": make()}, FOLDER / f"{make.__name__.removesuffix('_values')}.pt")

"""What a checkpoint holds, without regard to ranks: names, shapes, masters and Adam's moments."""

import math
from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]
EXPERT = ".deepspeed_experts."


@dataclass(frozen=True)
class Values:
    """The model and its optimizer at one step.

    Attributes:
        step: number of updates.
        shapes: of every parameter, in the module's order; experts have their global numbers.
        states: "master", "exp_avg" and "exp_avg_sq"; each a flat fp32 tensor for every name.
    """

    step: int
    shapes: Shapes
    states: dict[str, dict[str, Any]]


def llama_shapes(layers: int, hidden: int, *, vocabulary: int, experts: int = 0) -> Shapes:
    """Returns the names and shapes of a model of Llama's form, as `llama.py` has it.

    Args:
        layers: number of layers; 80 make the 723 tensors of a 70B model.
        hidden: width.
        vocabulary: number of tokens.
        experts: experts of each layer; 0: no MoE.
    """
    keys = max(1, hidden // 8)
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        attention = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        shapes |= _perceptron(f"{prefix}mlp.", hidden, experts)
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _perceptron(prefix: str, hidden: int, experts: int) -> Shapes:
    if not experts:
        inner = 7 * hidden // 2
        matrices = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        return {f"{prefix}{name}_proj.weight": shape for name, shape in matrices.items()}
    shapes: Shapes = {f"{prefix}deepspeed_moe.gate.wg.weight": (experts, hidden)}
    for expert in range(experts):
        for name in ("gate", "up", "down"):
            shapes[f"{prefix}deepspeed_moe.experts{EXPERT}{expert}.{name}_proj.weight"] = (hidden, hidden)
    return shapes


def invented_values(shapes: Shapes, step: int) -> Values:
    """Returns values that are different at each step, always the same for the same arguments.

    Args:
        shapes: of the parameters.
        step: number of updates.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    states: dict[str, dict[str, Any]] = {"master": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name, shape in shapes.items():
        noise = torch.rand(math.prod(shape), generator=generator)
        states["master"][name] = (noise - 0.5) * (1 + step / 1000)
        states["exp_avg"][name] = (noise - 0.5) / step
        states["exp_avg_sq"][name] = noise / step
    return Values(step, shapes, states)


def groups_of(shapes: Shapes) -> list[list[str]]:
    """Returns the names of each parameter group: matrices and vectors; or what is dense, and what is an expert's.

    Args:
        shapes: of the parameters.
    """
    if any(EXPERT in name for name in shapes):
        return [[name for name in shapes if EXPERT not in name], [name for name in shapes if EXPERT in name]]
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    return [matrices, [name for name in shapes if len(shapes[name]) <= 1]]

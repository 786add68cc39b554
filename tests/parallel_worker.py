"""Models that several ranks hold together, trained by DeepSpeed on CPU. Usage, jobs and reports: `ds_worker.py`."""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology
from deepspeed.utils import groups
from ds_worker import ENGINES, JOBS, ds_config, run_jobs

WIDTH, VOCABULARY = 8, 13


class Grid:
    """An `mpu`: neighbouring ranks hold a replica of the model together, as Megatron's do."""

    def __init__(self, model_parallel_size: int) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        model = [list(range(r, r + model_parallel_size)) for r in range(0, world_size, model_parallel_size)]
        data = [list(range(r, world_size, model_parallel_size)) for r in range(model_parallel_size)]
        self.groups, self.ranks = {}, {}
        for name, members in (("model", model), ("data", data)):
            for ranks in members:
                group = dist.new_group(ranks)
                if rank in ranks:
                    self.groups[name], self.ranks[name] = group, ranks

    def get_model_parallel_group(self) -> Any:
        return self.groups["model"]

    def get_model_parallel_rank(self) -> int:
        return self.ranks["model"].index(dist.get_rank())

    def get_model_parallel_world_size(self) -> int:
        return len(self.ranks["model"])

    def get_data_parallel_group(self) -> Any:
        return self.groups["data"]

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.ranks["data"]

    def get_data_parallel_rank(self) -> int:
        return self.ranks["data"].index(dist.get_rank())

    def get_data_parallel_world_size(self) -> int:
        return len(self.ranks["data"])


class Copied(torch.autograd.Function):
    """The same input on every rank: gradients are summed (Megatron's f)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].float()
        dist.all_reduce(total, group=ctx.group)
        return total.to(grads[0].dtype), None


class Summed(torch.autograd.Function):
    """Partial outputs are summed over the ranks (Megatron's g)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        total = x.float()
        dist.all_reduce(total, group=group)
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class TensorParallelModel(torch.nn.Module):
    """A column- and a row-parallel linear between replicated, tied embeddings; a frozen parameter and a buffer."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.group, size = grid.get_model_parallel_group(), grid.get_model_parallel_world_size()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        torch.manual_seed(70 + grid.get_model_parallel_rank())
        self.column = torch.nn.Linear(WIDTH, 12 // size)
        self.row = torch.nn.Linear(12 // size, WIDTH, bias=False)
        self.frozen = torch.nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("mean", torch.zeros(12 // size))
        for parameter in (self.column.weight, self.column.bias, self.row.weight):
            parameter.model_parallel = True

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        hidden = torch.tanh(self.column(Copied.apply(self.norm(x), self.group)))
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * hidden.detach().float().mean((0, 1)).to(self.mean.dtype))
        return self.head(x + Summed.apply(self.row(hidden), self.group))


def tensor_parallel_engine(job: dict[str, Any]) -> Any:
    """An engine whose data-parallel ranks are len(ranks) / job["mp"]; the batch is the same on every rank."""
    grid = Grid(job["mp"])
    model = TensorParallelModel(grid)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(job), mpu=grid)
    return engine


class Embedding(torch.nn.Module):
    """Tied between the first layer and the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens)


class Block(torch.nn.Module):
    """A pipeline's layer, with a frozen parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.linear(x))
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * hidden.detach().float().mean((0, 1)).to(self.mean.dtype))
        return x + hidden


def logits(embedding: Embedding, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, embedding.embedding.weight)


def cross_entropy(output: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output.float().flatten(0, 1), tokens.flatten())


def pipeline_engine(job: dict[str, Any]) -> Any:
    """An engine of two stages. job["mp"] 4: two ranks a stage, which only the files of a real model would cut."""
    tensor_parallel_size, world_size = job["mp"] // 2, dist.get_world_size()
    topology = PipeDataParallelTopology(num_pp=2, num_dp=world_size // 2)
    if tensor_parallel_size > 1:
        topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=world_size // 4)
        torch.manual_seed(70 + dist.get_rank() % 2)  # the two hold different numbers
    tied = {"tied_weight_attr": "embedding.weight"}
    last = TiedLayerSpec("embed", Embedding, forward_fn=logits, **tied)
    layers = [TiedLayerSpec("embed", Embedding, **tied), torch.tanh, *[LayerSpec(Block)] * 3, last]
    module = PipelineModule(layers, topology=topology, loss_fn=cross_entropy, partition_method="uniform")
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config(job))
    return engine


class Expert(torch.nn.Module):
    """A parameter of odd size, one that is frozen, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(WIDTH, 5)
        self.outer = torch.nn.Linear(5, WIDTH, bias=False)
        self.shift = torch.nn.Parameter(torch.full((WIDTH,), 0.25), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.add_(1)
        return self.outer(torch.tanh(self.inner(x))) + self.shift


class MoEModel(torch.nn.Module):
    """Two MoE layers between dense ones, the second with a residual."""

    def __init__(self, experts: list[int], ep_sizes: list[int]) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = torch.nn.Linear(WIDTH, WIDTH)
        options = {"k": 1, "min_capacity": 0, "capacity_factor": 4.0, "use_rts": False}
        self.moe = torch.nn.ModuleList(
            MoE(WIDTH, Expert(), num_experts=count, ep_size=ep_size, use_residual=number == 1, **options)
            for number, (count, ep_size) in enumerate(zip(experts, ep_sizes, strict=True))
        )
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.hidden(self.embedding(tokens)))
        for layer in self.moe:
            x = x + layer(x)[0]
        return self.head(x)


def moe_engine(job: dict[str, Any]) -> Any:
    """An engine whose experts start unlike each other on every rank."""
    for made in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP):
        made.clear()  # an earlier job's ranks may have been ordered in another way
    model = MoEModel(job["experts"], job["ep_sizes"])
    for name, parameter in model.named_parameters():
        if "deepspeed_experts" in name and parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    trained = {"params": [p for p in model.parameters() if p.requires_grad], "name": "all"}
    size = job.get("max_group_size", 178956971)
    optimizer = torch.optim.AdamW(split_params_into_different_moe_groups_for_optimizer(trained, size), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(job))
    return engine


ENGINES["moe"] = moe_engine
ENGINES["tensor parallel"] = tensor_parallel_engine
ENGINES["pipeline"] = pipeline_engine

if __name__ == "__main__":
    run_jobs(JOBS)

"""Averages in running engines on CPU. Usage, jobs and reports: `ds_worker.py`."""

import itertools
import resource
import signal
from collections.abc import Iterator
from typing import Any

import deepspeed
import parallel_worker as parallel_worker  # adds its engines
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import safe_get_full_fp32_param
from ds_models import TinyModel
from ds_worker import ENGINES, JOBS, batch, build_engine, digest, ds_config, master_partitions, module_weights, run_jobs

from wsm_ds.averaging import Anchored, Ema, SlotMeans
from wsm_ds.averaging.averages import Rule
from wsm_ds.errors import WsmError


class NoisyModel(TinyModel):
    """Draws random numbers and changes buffers in training."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(super().forward(tokens), 0.1, self.training)


def noisy_engine(job: dict[str, Any]) -> Any:
    model = NoisyModel()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[:2], "weight_decay": 0.1}, {"params": trained[2:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(job))
    return engine


ENGINES["noisy"] = noisy_engine


def loss_of(engine: Any, tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), tokens.flatten())


def micro_steps(engine: Any, step: int, *, overflows: bool = False) -> Iterator[float]:
    """Makes an update, and yields after each call of the engine's step()."""
    tokens = batch(step, "same")
    if isinstance(engine, PipelineEngine):
        yield engine.train_batch(itertools.repeat((tokens, tokens))).item()
        return
    for _ in range(engine.gradient_accumulation_steps()):
        loss = loss_of(engine, tokens)
        engine.backward(loss * float("inf") if overflows else loss)
        engine.step()
        yield loss.item()


def masters_of(engine: Any) -> list[torch.Tensor]:
    """Stage 3 leaves what it likes in the padding of its partitions."""
    if engine.zero_optimization_stage() == 3:
        return [safe_get_full_fp32_param(p) for p in engine.module.parameters() if p.requires_grad]
    return master_partitions(engine)


def state_of(engine: Any) -> dict[str, str]:
    """A digest of everything that training goes on from."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    moments = [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
    return {
        "masters": digest(masters_of(engine)),
        "moments": digest(moments),
        "module": digest(module_weights(engine).values()),
        "buffers": digest(engine.module.buffers()),
        "random": digest([torch.get_rng_state()]),
        "modes": str([module.training for module in engine.module.modules()]),
    }


def ulps(found: list[torch.Tensor], expected: list[torch.Tensor], largest: list[torch.Tensor]) -> float:
    """The largest error of an element, in ulps of its largest sample."""
    worst = 0.0
    for value, reference, size in zip(found, expected, largest, strict=True):
        if value.numel():
            ulp = (torch.nextafter(size.float(), torch.tensor(float("inf"))) - size.float()).double()
            worst = max(worst, ((value.double() - reference).abs() / ulp).max().item())
    return worst


def do_average(job: dict[str, Any]) -> dict[str, Any]:
    """Compares an engine's averages with those of every update in float64."""
    engine = build_engine(job)
    rules: dict[str, Rule] = {"ema": Ema(half_life=3.0), "1-sqrt": Anchored(0.5)}
    slots = SlotMeans(engine, None, every=1000, averages=rules)
    seen: list[list[torch.Tensor]] = []
    for step in range(1, job["steps"] + 1):
        for _ in micro_steps(engine, step, overflows=step in job.get("overflow_at", ())):
            slots.update()
        if engine.was_step_applied():
            seen.append([master.detach().double().clone() for master in master_partitions(engine)])
    weights = {name: [1.0] for name in rules}
    for n in range(2, len(seen) + 1):
        for name, rule in rules.items():
            weight = rule.weight(n, 1)
            weights[name] = [w * (1 - weight) for w in weights[name]] + [weight]
    weights["mean"] = [1 / len(seen)] * len(seen)
    averages: dict[str, Any] = {"mean": slots.mean, **slots.averages}
    largest = [torch.stack(of_step).abs().amax(0) for of_step in zip(*seen, strict=True)]
    return {
        "applied": len(seen),
        "count": slots.mean.count,
        "errors": {
            name: ulps(
                list(averages[name].values()),
                [sum(w * x for w, x in zip(row, of_step, strict=True)) for of_step in zip(*seen, strict=True)],
                largest,
            )
            for name, row in weights.items()
        },
    }


def do_swap(job: dict[str, Any]) -> dict[str, Any]:
    """Trains with evaluations of the mean between the updates, or without; reports all that training goes on from."""
    engine = build_engine(job)
    slots = SlotMeans(engine, None, every=1000)
    losses, evaluations = [], []
    same = True
    for step in range(1, job["steps"] + 1):
        for loss in micro_steps(engine, step, overflows=step in job.get("overflow_at", ())):
            losses.append(loss)
            slots.update()
        if job["evaluates"] and step % 2 == 0 and slots.mean.count:
            before = state_of(engine)
            evaluations.append(evaluated(engine, slots, job))
            same = same and state_of(engine) == before
    return {"losses": losses, "evaluations": evaluations, "same": same, "state": state_of(engine)}


def evaluated(engine: Any, slots: SlotMeans, job: dict[str, Any]) -> dict[str, Any]:
    """Losses of the raw weights and of the mean, and how far the module's weights are from those it should have."""
    tokens = batch(1000, "same")
    pairs = itertools.repeat((tokens, tokens))

    def loss() -> float:
        if isinstance(engine, PipelineEngine):
            return engine.eval_batch(iter(pairs)).item()
        engine.eval()
        with torch.no_grad():
            return loss_of(engine, tokens).item()

    with slots.swapped_in():
        mean, weights = loss(), module_weights(engine)
        if not isinstance(engine, PipelineEngine):
            engine.train()
            with torch.no_grad():
                loss_of(engine, tokens)  # draws random numbers, changes buffers
    try:
        with slots.swapped_in():
            raise KeyError("an evaluation failed")
    except KeyError:
        engine.train()
    distance = sum((weights[name] - value).abs().sum().item() for name, value in module_weights(engine).items())
    return {"mean": mean, "distance": distance}


def do_mistakes(job: dict[str, Any]) -> dict[str, Any]:
    """What is said of calls that were forgotten or made twice, and of unfit moments."""
    engine = build_engine(job)
    said: list[str] = []

    def try_to(call: Any) -> None:
        try:
            call()
            said.append("nothing")
        except WsmError as error:
            said.append(f"{type(error).__name__}: {error}")

    def swap(slots: SlotMeans, average: str | None = None) -> None:
        with slots.swapped_in(average):
            if average is None:
                list(micro_steps(engine, 99))

    try_to(lambda: SlotMeans(engine, None, every=10, sample=3))
    slots = SlotMeans(engine, None, every=10)
    try_to(slots.update)  # before any step
    try_to(lambda: swap(slots, "ema"))
    try_to(lambda: swap(slots))
    list(micro_steps(engine, 1))
    try_to(slots.update)
    try_to(slots.update)  # twice
    list(micro_steps(engine, 2))
    list(micro_steps(engine, 3))
    try_to(slots.update)  # one was forgotten
    slots.restart()
    list(micro_steps(engine, 4))
    try_to(slots.update)
    try_to(lambda: swap(slots))  # trains in it
    return {"said": said, "count": slots.mean.count, "first": slots.first}


def do_refused(job: dict[str, Any]) -> dict[str, Any]:
    """What is said of an engine whose masters cannot be averaged."""
    engine = build_engine(job)
    for name, value in job["pretend"].items():
        if name == "class":
            engine.optimizer.__class__ = type(value, (type(engine.optimizer),), {})
        else:
            setattr(engine.optimizer, name, value)
    try:
        SlotMeans(engine, None, every=10)
    except WsmError as error:
        return {"said": f"{type(error).__name__}: {error}"}
    return {"said": "nothing"}


def do_slots(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the slots of a run, the last one short; dumps the float64 sums of every update's masters, by name."""
    engine = build_engine(job)
    slots = SlotMeans(engine, job["run"], every=job["every"], sample=job.get("sample", 1), kind=job.get("kind", "mean"))
    named = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    steps: list[dict[str, torch.Tensor]] = []
    partitions: list[list[torch.Tensor]] = []
    for step in range(1, job["steps"] + 1):
        for _ in micro_steps(engine, step):
            slots.update()
        partitions.append([master.double().clone() for master in master_partitions(engine)])
        steps.append({name: safe_get_full_fp32_param(p).double().clone() for name, p in named.items()})
    if job["steps"] % job["every"]:
        slots.end_slot()
    dump: dict[str, Any] = {"steps": steps, "partitions": partitions}
    with slots.swapped_in(last=job["last"]):
        dump["swapped"] = module_weights(engine)
    slots.close()
    engine.save_checkpoint(job["run"], tag=f"global_step{engine.global_steps}")
    torch.save(dump, f"{job['dump']}.rank{dist.get_rank()}")
    return {}


def do_fault(job: dict[str, Any]) -> dict[str, Any]:
    """Trains over three slots, the second of which cannot be written by rank 1; the training does not end by it."""
    engine = build_engine(job)
    slots = SlotMeans(engine, job["run"], every=3)
    assert slots.folder is not None
    losses = []
    for step in range(1, 10):
        if dist.get_rank() == 1:
            with_fault(slots, job["fault"], is_now=step == 6)
        for loss in micro_steps(engine, step):
            losses.append(loss)
            slots.update()
    slots.close()
    dist.barrier()
    return {"losses": losses, "left": sorted(path.name for path in slots.folder.root.iterdir())}


def with_fault(slots: SlotMeans, fault: str, *, is_now: bool) -> None:
    if fault == "nan" and is_now:
        for rest in slots.mean._rests:
            rest[0] = float("nan")
    if fault == "full":  # a file of this process grows to no more than 1 kB, as on a disk that is full
        slots.close()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if is_now else resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def do_killed(job: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 never writes its files of the second slot, as if it were killed."""
    engine = build_engine(job)
    slots = SlotMeans(engine, job["run"], every=3)
    assert slots.folder is not None
    for step in range(1, 7):
        if step == 6 and dist.get_rank() == 1:
            slots.folder.writer.begin = lambda *_: None  # type: ignore[method-assign]
        for _ in micro_steps(engine, step):
            slots.update()
    slots.close()
    dist.barrier()
    before = sorted(path.name.split(".")[-1] for path in slots.folder.root.iterdir())
    again = SlotMeans(engine, job["run"], every=3)
    after = sorted(path.name for path in slots.folder.root.iterdir())
    engine.global_steps = 2  # as if an older checkpoint had been loaded
    again.restart()
    return {"before": before, "after": after, "resumed": sorted(path.name for path in slots.folder.root.iterdir())}


def do_ends(job: dict[str, Any]) -> dict[str, Any]:
    """Writes slots that end at given steps."""
    engine = build_engine(job)
    slots = SlotMeans(engine, job["run"], every=1000, kind=job["kind"])
    for step in range(1, job["ends"][-1] + 1):
        for _ in micro_steps(engine, step):
            if step == job["changes_at"]:
                engine.optimizer.param_groups[0]["lr"] *= 0.5
            slots.update()
        if step in job["ends"]:
            slots.end_slot()
    slots.close()
    return {}


JOBS |= {
    "slots": do_slots,
    "ends": do_ends,
    "fault": do_fault,
    "killed": do_killed,
    "average": do_average,
    "swap": do_swap,
    "mistakes": do_mistakes,
    "refused": do_refused,
}

if __name__ == "__main__":
    run_jobs(JOBS)

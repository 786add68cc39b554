"""Pretrains a GPT with DeepSpeed. The run may be killed, preempted, extended and moved to other nodes at any time.

    torchrun --nproc-per-node 8 launch/pretrain.py --run RUN --config configs/zero2_bf16.json --until-step 10000 \
        --save-every 500 --data tokens.bin --layers 24 --width 1024 --heads 16 --context 2048 --vocabulary 50304

The same command again goes on where the run stopped. A larger --until-step extends the run. The global batch is the
config's `train_batch_size` on any number of ranks: DeepSpeed accumulates as many micro batches as that needs.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from gpt import GPT, GPTSize
from tokens import Samples, open_tokens

from wsm_ds.errors import WsmError
from wsm_ds.training import TrainingJob
from wsm_ds.training.matmul_speed import warn_if_dtype_is_slow


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    # --run-folder, because torchrun takes --run for an abbreviation of its own --run-path, unless -- stands before it
    add("--run", "--run-folder", type=Path, required=True, help="the run's folder, on storage that all nodes see")
    add("--config", type=Path, required=True, help="DeepSpeed's config; configs/ has some")
    add("--until-step", type=int, required=True, metavar="N", help="updates after which the run is done")
    add("--save-every", type=int, required=True, metavar="M", help="save a checkpoint at each multiple of M updates")
    add("--data", type=Path, required=True, help="a .bin file of uint16 or uint32 tokens, or text: a file or a folder")
    add("--layers", type=int, default=GPTSize.layers)
    add("--width", type=int, default=GPTSize.width)
    add("--heads", type=int, default=GPTSize.heads)
    add("--context", type=int, default=GPTSize.context)
    add("--vocabulary", type=int, default=GPTSize.vocabulary)
    add("--dropout", type=float, default=GPTSize.dropout)
    add("--seed", type=int, default=0, help="decides the weights, the order of the data, and dropout")
    add(
        "--collective-timeout-s",
        type=float,
        default=600.0,
        metavar="T",
        help="seconds after which ranks that wait for a hung one end (default %(default)g)",
    )
    # The deepspeed launcher passes it (launcher/launch.py); LOCAL_RANK says the same.
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.width % options.heads:
        parser.error(f"--width {options.width} is not a multiple of --heads {options.heads}")
    if not options.config.is_file():
        parser.error(f"--config {options.config} is not a file")
    return options


def train_step(engine: Any, samples: Samples) -> float:
    """Makes one update on the next `train_batch_size` samples of the run; returns their mean loss. Ranks: all."""
    micro, ranks = engine.train_micro_batch_size_per_gpu(), dist.get_world_size()
    first, total = engine.global_samples + dist.get_rank() * micro, torch.zeros((), device=engine.device)
    for number in range(engine.gradient_accumulation_steps()):
        start = first + number * ranks * micro
        loss = engine(samples.batch(range(start, start + micro)).to(engine.device))
        engine.backward(loss)
        engine.step()
        total += loss.detach() / engine.gradient_accumulation_steps()
    dist.all_reduce(total)
    return float(total.item() / ranks)


def train(options: argparse.Namespace) -> int:
    """Trains until the run is done or a signal comes; returns the exit code. Ranks: all."""
    job = TrainingJob(
        options.run,
        until_step=options.until_step,
        save_every=options.save_every,
        seed=options.seed,
        collective_timeout_s=options.collective_timeout_s,
        constants={"context": options.context, "data": options.data.name},
    )
    if job.is_done:
        return job.close()
    size = GPTSize(**{name: getattr(options, name) for name in GPTSize.__dataclass_fields__})
    tokens = open_tokens(options.data, size.vocabulary)
    samples = Samples(tokens, context=size.context, vocabulary=size.vocabulary, seed=options.seed)
    torch.manual_seed(options.seed)
    model = GPT(size)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=str(options.config))
    if job.rank == 0:
        warn_if_dtype_is_slow("bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32")
    for _ in job.steps(engine):
        job.record(learning_rate=engine.get_lr()[0], loss=train_step(engine, samples))
    return job.close()


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns the exit code: 0 done, 75 saved after a signal, 1 an error."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%F %T", level=logging.WARNING)
    try:
        return train(parse(arguments))
    except WsmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())

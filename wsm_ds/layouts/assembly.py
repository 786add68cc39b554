"""The last step of every reader: one Layout from all model-parallel ranks' files and the fragments in them."""

from typing import Any

from wsm_ds.layouts.coverage import require_whole
from wsm_ds.layouts.fragments import shared
from wsm_ds.layouts.hyperparameters import is_train_mode, learning_rates, warmup_num_steps
from wsm_ds.layouts.layout import Layout, TableBuilder
from wsm_ds.layouts.metadata import module_dtype
from wsm_ds.layouts.rank_files import RankFiles
from wsm_ds.layouts.run import Checkpoint
from wsm_ds.layouts.snapshot import snapshot_in


def assemble(
    checkpoint: Checkpoint,
    ranks: list[RankFiles],
    builder: TableBuilder,
    *,
    stage: int,
    file_names: tuple[str, ...],
    groups: Any,
    has_nameless_states: bool = False,
    contradictions: tuple[str, ...] = (),
) -> Layout:
    """Builds the layout of a checkpoint.

    If several model-parallel ranks hold the model together, the name of a rank precedes the names of its tensors
    (`mp_rank_01/NAME`). Names alone do not say whether two ranks hold copies or different parts of one tensor.

    Args:
        checkpoint: the folder that was read.
        ranks: the files of each model-parallel rank.
        builder: all fragments; its tensor and file numbers run on from one rank to the next.
        stage: ZeRO stage of the run.
        file_names: paths of all files relative to the checkpoint's folder, in the order of their numbers.
        groups: `param_groups` of the optimizer.
        has_nameless_states: whether the files hold optimizer states of unknown parameters.
        contradictions: see `Layout`.

    Raises:
        BrokenCheckpoint: a tensor is not in the files whole; it is named.
    """
    first = ranks[0]
    prefixes = [f"mp_rank_{mp:02d}/" if len(ranks) > 1 else "" for mp in range(len(ranks))]
    named_ranks = list(zip(prefixes, ranks, strict=True))
    tensors = {prefix + name: info for prefix, rank in named_ranks for name, info in rank.tensors.items()}
    fragments = shared(builder.tables())
    require_whole(tensors, fragments, str(checkpoint.path))
    return Layout(
        path=checkpoint.path,
        tag=checkpoint.tag,
        # From the file, not from the tag: a user may choose any tag in `save_checkpoint`.
        step=int(first.models[0].tree["global_steps"]),
        stage=stage,
        world_size=first.world_size,
        dtype=module_dtype(first.tensors),
        files=file_names,
        archives=tuple(file.archive for rank in ranks for file in rank.files),
        tensors=tensors,
        aliases={prefix + alias: prefix + name for prefix, rank in named_ranks for alias, name in rank.aliases.items()},
        fragments=fragments,
        learning_rates=learning_rates(first.optims.get(0, first.models[0]), groups),
        warmup_num_steps=warmup_num_steps(first.models[0].tree),
        is_train_mode=is_train_mode(groups),
        indivisible_states=builder.indivisible_states,
        contradictions=contradictions,
        has_nameless_states=has_nameless_states,
        model_parallel_size=len(ranks),
        extra_states=tuple(prefix + name for prefix, rank in named_ranks for name in rank.extra_states),
        opaque={prefix + name: what for prefix, rank in named_ranks for name, what in rank.opaque.items()},
        snapshot=snapshot_in(first.models[0].tree),
    )

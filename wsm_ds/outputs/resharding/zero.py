"""All files of a ZeRO checkpoint in another form: templates, and where each kind's elements belong in them."""

from wsm_ds.layouts import zero3, zero12
from wsm_ds.layouts.layout import Table, TableBuilder
from wsm_ds.layouts.rank_files import RankFiles
from wsm_ds.outputs.resharding.form import Form, Origin
from wsm_ds.outputs.resharding.model_file import model_tree
from wsm_ds.outputs.resharding.optimizer_file import optimizer_tree
from wsm_ds.outputs.torch_template import TorchTemplate, inputs_of, make_torch_template
from wsm_ds.planning.plan import Template


def zero_templates(
    origin: Origin, form: Form, first_input: int, keeps_states: bool, allowed_globals: frozenset[str]
) -> tuple[list[Template], dict[str, Table]]:
    """Templates of every rank's files; the tables' `file` counts them.

    Args:
        first_input: the plan's number of the origin's first file.
        keeps_states: whether there is room for optimizer states.
    """
    inputs = inputs_of(origin.layout, first_input)
    ranks = range(form.world_size)
    models: dict[int, TorchTemplate] = {}
    optims: dict[int, TorchTemplate] = {}
    prefix = "bf16_" if origin.has_bf16_enabled else ""
    for rank in ranks if form.stage == 3 else (0,):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if form.stage == 3 else "mp_rank_00_model_states.pt"
        tree, like = model_tree(origin, form, rank), origin.models[0].archive
        models[rank] = make_torch_template(name, tree, like, inputs, allowed_globals)
    for rank in ranks:
        name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        tree, like = optimizer_tree(origin, form, rank, keeps_states), origin.optimizer.archive
        optims[rank] = make_torch_template(name, tree, like, inputs, allowed_globals)
    made = [*models.values(), *optims.values()]
    layout = origin.layout
    files = RankFiles(
        {rank: made.file for rank, made in models.items()},
        {rank: made.file for rank, made in optims.items()},
        {entry.file.path: index for index, entry in enumerate(made)},
        layout.tensors,
        layout.aliases,
        form.world_size,
    )
    builder = TableBuilder()
    (zero3 if form.stage == 3 else zero12).place(builder, files)
    return [entry.template for entry in made], builder.tables()

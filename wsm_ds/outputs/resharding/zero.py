"""All files of a ZeRO checkpoint in another form, as templates."""

from collections.abc import Mapping
from functools import partial

from wsm_ds.layouts import zero3, zero12
from wsm_ds.layouts.layout import Table, TableBuilder
from wsm_ds.layouts.rank_files import RankFiles
from wsm_ds.layouts.saved_names import with_parameter_names
from wsm_ds.outputs.resharding.form import Form, Origin
from wsm_ds.outputs.resharding.model_file import model_tree, require_places
from wsm_ds.outputs.resharding.optimizer_file import optimizer_tree
from wsm_ds.outputs.torch_template import TorchContent, TorchTemplate, inputs_of
from wsm_ds.planning.plan import InputNumber, Template


def zero_templates(
    origin: Origin, form: Form, first_input: InputNumber, keeps_states: bool, allowed_globals: frozenset[str]
) -> tuple[list[Template], Mapping[str, Table]]:
    """Makes every rank's files.

    Args:
        origin: the newest checkpoint.
        form: the form of the new checkpoint.
        first_input: the plan's number of the origin's first file.
        keeps_states: whether the optimizer files hold optimizer states.
        allowed_globals: see `open_torch_file`.

    Returns:
        The files, and by kind where elements belong in them; `file` in the tables is the index of a template.

    Raises:
        UnsupportedLayout: the new form has no place for a tensor; it is named.
    """
    require_places(origin, form)
    inputs = inputs_of(origin.layout, first_input)
    ranks = range(form.world_size)
    content = partial(TorchContent, inputs=inputs, allowed_globals=allowed_globals)
    contents: dict[tuple[str, int, bool], TorchContent] = {}
    models: dict[int, TorchTemplate] = {}
    optims: dict[int, TorchTemplate] = {}
    prefix = "bf16_" if origin.has_bf16_enabled else ""
    for rank in ranks if form.stage == 3 else (0,):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if form.stage == 3 else "mp_rank_00_model_states.pt"
        model = origin.models.get(rank, origin.models[0])
        # Model files that are alike differ in their elements alone; only rank 0's names the tied weights.
        key = "model", id(model.memo), rank == 0
        if key not in contents:
            contents[key] = content(model_tree(origin, form, rank), origin.models[0].archive)
        models[rank] = contents[key].template(name, model.path)
    for rank in ranks:
        name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        key = "optimizer", 0 if form.stage == 3 else rank, False
        if key not in contents:
            tree = optimizer_tree(origin, form, rank, keeps_states)
            contents[key] = content(tree, origin.optimizer.archive)
        optims[rank] = contents[key].template(name)
    templates = [*models.values(), *optims.values()]
    layout = origin.layout
    files = RankFiles(
        {rank: with_parameter_names(template.file) for rank, template in models.items()},
        {rank: template.file for rank, template in optims.items()},
        {template.file.path: index for index, template in enumerate(templates)},
        layout.tensors,
        layout.aliases,
        form.world_size,
    )
    builder = TableBuilder()
    (zero3 if form.stage == 3 else zero12).add_fragments(builder, files)
    return [template.template for template in templates], builder.tables()

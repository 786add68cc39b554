"""Makes a run of any number of ranks, in DeepSpeed's form, without training it.

python -m benchmarks.many_ranks RUN --kind zero3 --ranks 1024 --layers 80 --checkpoints 16 --forms FORMS
"""

import argparse
from pathlib import Path

from benchmarks.many_ranks.forms import ARGUMENTS, form
from benchmarks.many_ranks.run import make_run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path)
parser.add_argument("--kind", choices=ARGUMENTS, required=True)
parser.add_argument("--ranks", type=int, required=True)
parser.add_argument("--layers", type=int, default=80, help="80 layers have 723 tensors")
parser.add_argument("--hidden", type=int, default=64)
parser.add_argument("--experts", type=int, default=0, help="of each layer, for moe")
parser.add_argument("--ep", type=int, default=1, help="expert-parallel ranks, for moe")
parser.add_argument("--checkpoints", type=int, default=4)
parser.add_argument("--all-real", action="store_true", help="zero3: no hard links; every rank has values of its own")
parser.add_argument("--forms", type=Path, required=True, help="where DeepSpeed's runs of two ranks are kept")
options = parser.parse_args()
make_run(
    options.run,
    form(options.kind, options.forms),
    options.kind,
    world_size=options.ranks,
    layers=options.layers,
    hidden=options.hidden,
    experts=options.experts,
    ep=options.ep,
    checkpoints=options.checkpoints,
    all_real=options.all_real,
)

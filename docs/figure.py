"""Draws docs/assets/merge_gain.svg: a constant-rate run's validation loss, raw and merged.

    python launch/quickstart.py --out quickstart
    python docs/figure.py quickstart/run          # measures: writes docs/assets/merge_gain.json, then draws
    python docs/figure.py                         # draws again from the JSON

Every checkpoint of the quickstart's run is evaluated, and the linear merge of the 8 checkpoints that end there. The
model, the held-out text and the batches are those of the quickstart, so the last rows are those of its table.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "docs/assets"
DATA = ASSETS / "merge_gain.json"
WINDOW, WARMUP_STEPS, BATCHES = 8, 40, 16
FIRST_STEP = 800
"""Drawn from here on. The JSON has all steps: earlier, the loss falls fast, and a merge, which is older, is behind."""
WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 64, 52

STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de; }
  text { fill: #24292f; font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
  .title { font-size: 16px; font-weight: 600; }
  .axis { fill: #57606a; font-size: 12px; }
  .grid { stroke: #d8dee4; stroke-width: 1; }
  .raw { stroke: #b35900; fill: none; stroke-width: 2; stroke-linejoin: round; }
  .merged { stroke: #0969da; fill: none; stroke-width: 2.5; stroke-linejoin: round; }
  .raw-label { fill: #b35900; font-weight: 600; }
  .merged-label { fill: #0969da; font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #30363d; }
    text { fill: #e6edf3; }
    .axis { fill: #9ea7b3; }
    .grid { stroke: #2b313a; }
    .raw { stroke: #f0a35a; }
    .merged { stroke: #58a6ff; }
    .raw-label { fill: #f0a35a; }
    .merged-label { fill: #58a6ff; }
  }
"""


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the run's checkpoints after the warmup, oldest first."""
    steps = sorted(int(path.name.removeprefix("global_step")) for path in run.glob("global_step*"))
    return [step for step in steps if step >= WARMUP_STEPS]


def measure(run: Path) -> dict[str, object]:
    """The validation losses of all raw checkpoints, and of the merge that ends at each."""
    import torch

    sys.path.insert(0, str(ROOT / "launch"))
    from quickstart import batch, texts

    torch.set_num_threads(1)
    steps = checkpoint_steps(run)
    ends = steps[WINDOW - 1 :]
    _, held_out = texts()
    batches = [batch(held_out, 16, seed) for seed in range(BATCHES)]
    with tempfile.TemporaryDirectory() as folder:
        raw = dict(losses(run, 1, steps, batches, Path(folder, "raw")))
        merged = dict(losses(run, WINDOW, ends, batches, Path(folder, "merged")))
    return {
        "what": f"validation loss (nats per byte) of the quickstart's GPT; merge: linear, last {WINDOW} checkpoints",
        "tokens": sum(tokens[:, 1:].numel() for tokens in batches),
        "window": WINDOW,
        "interval_steps": steps[1] - steps[0],
        "raw": raw,
        "merged": merged,
    }


def losses(
    run: Path, last: int, ends: Sequence[int], batches: Sequence["Tensor"], out: Path
) -> Iterator[tuple[int, float]]:
    """Merges the `last` checkpoints up to each end, in one pass, and yields (end, validation loss)."""
    import torch
    from gpt import GPT
    from safetensors.torch import load_file

    from wsm_ds import make_recipes, merge_all

    recipes = make_recipes(
        run=run, last=last, to_step=list(ends), curve="linear", format="safetensors", dtype="bf16", out=out
    )
    merge_all(recipes)
    for end, recipe in zip(ends, recipes, strict=True):
        model = GPT().to(torch.bfloat16)
        (shard,) = Path(recipe.out).glob("*.safetensors")
        weights = load_file(shard)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"head.weight", "tokens.weight"}:
            raise SystemExit(f"{shard}: missing {missing}, unexpected {unexpected}")
        with torch.no_grad():
            values = [model(tokens).item() for tokens in batches]
        yield end, sum(values) / len(values)


def draw(data: dict[str, dict[str, float]]) -> str:
    """The figure as SVG, from the data as JSON has it."""
    series = {name: [(int(step), loss) for step, loss in data[name].items()] for name in ("raw", "merged")}
    series = {name: [point for point in points if point[0] >= FIRST_STEP] for name, points in series.items()}
    first = series["merged"][0][0]
    values = [loss for points in series.values() for _, loss in points]
    low, high = math.floor(min(values) * 10) / 10, math.ceil(max(values) * 10) / 10
    last = series["raw"][-1][0]

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-labelledby="title description">',
        '<title id="title">Merging checkpoints instead of decaying the learning rate</title>',
        '<desc id="description">Validation loss against steps: the raw checkpoints of a run at a constant learning '
        f"rate, and below them the merge of the last {WINDOW} checkpoints at each of these steps.</desc>",
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
        f'<text class="title" x="{LEFT}" y="28">A tiny GPT at a constant learning rate: validation loss</text>',
    ]
    for tick in range(round(low * 10), round(high * 10) + 1):
        loss = tick / 10
        lines.append(f'<path class="grid" d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}"/>')
        lines.append(f'<text class="axis" x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.1f}</text>')
    for step in range(-(-first // 200) * 200, last + 1, 200):
        lines.append(
            f'<text class="axis" x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{step}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    lines.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">optimizer steps</text>')
    lines += [
        f'<polyline class="{name}" points="{" ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)}"/>'
        for name, points in series.items()
    ]
    for name, label, column in (
        ("raw", "raw checkpoints", LEFT),
        ("merged", f"merge of the last {WINDOW} (linear)", LEFT + 190),
    ):
        lines.append(f'<path class="{name}" d="M{column} 46h24"/>')
        lines.append(f'<text class="{name}-label" x="{column + 32}" y="51">{label}</text>')
    return re.sub(r"\n\s*\n", "\n", "\n".join([*lines, "</svg>", ""]))


def main() -> None:
    """Parses the command line, measures if a run is given, and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="the quickstart's run; without it, DATA is drawn again")
    options = parser.parse_args()
    if options.run:
        DATA.write_text(json.dumps(measure(options.run), indent=1) + "\n", encoding="utf-8")
    DATA.with_suffix(".svg").write_text(draw(json.loads(DATA.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()

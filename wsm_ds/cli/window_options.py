"""Flags of windows that are measured in tokens or samples, or chosen by scores."""

import argparse
from pathlib import Path


def counted_window_options(window: argparse._ActionsContainer) -> None:
    """Adds the flags of windows in tokens and samples."""
    window.add_argument(
        "--last-tokens", metavar="D[,D...]",
        help="the checkpoints of the newest D tokens, for example 100B; several make several outputs",
    )  # fmt: skip
    window.add_argument("--last-samples", metavar="D[,D...]", help="the same in samples (sequences)")


def count_options(window: argparse._ActionsContainer) -> None:
    """Adds the flags that say how many tokens there are, and where the data changed."""
    window.add_argument(
        "--sequence-length", type=int, metavar="TOKENS", help="tokens of a sample, if the files tell the samples alone"
    )
    window.add_argument(
        "--tokens-per-step", metavar="TOKENS", help="tokens of a step, for a run whose batch never changed"
    )
    window.add_argument(
        "--data-switch", type=int, metavar="STEP",
        help="the last step before the training data changed: show how much of the merge comes after it, and warn of "
        "a window across it",
    )  # fmt: skip


def scores_options(window: argparse._ActionsContainer) -> None:
    """Adds the flags of a selection by score."""
    window.add_argument(
        "--top",
        metavar="K[,K...]",
        help="of the window, only the K checkpoints with the best scores; several numbers make several outputs",
    )
    window.add_argument(
        "--scores", type=Path, metavar="FILE.jsonl", help="with --top: evaluations of the run's single checkpoints"
    )
    window.add_argument(
        "--metric", metavar="NAME", help="with --top: the metric in FILE that decides (default: the only one)"
    )


def by_option(group: argparse._ActionsContainer) -> None:
    """Adds --by."""
    group.add_argument(
        "--by", choices=("steps", "samples", "tokens"),
        help="the unit of the distances between checkpoints (default: that of the window's length, else steps)",
    )  # fmt: skip

"""A tuning of a made-up run, with all that a report shows, and evaluations as records."""

import hashlib
import math
import random
from pathlib import Path
from typing import Any, Literal

from wsm_ds.evaluation.evaluation import Blocks, Evaluation, Metric, Subject, SubjectSource
from wsm_ds.schedules.coefficients import merge_coefficients
from wsm_ds.tuning.results import CandidateResult, Difference, Recommendation, Span, TuningResult

TOKENS_PER_STEP = 4_000_000
INTERVAL = 250
ENDS = (16_000, 18_000, 20_000)
WINDOWS = (4, 8, 16, 32)
HOSTILE = 'a|b <script>alert(1)</script> & "c" \x1b[31m\n`d` *e*'


def span(steps: float) -> Span:
    return Span(steps=steps, tokens=steps * TOKENS_PER_STEP)


def merge_candidate(end: int, curve: str, count: int, loss: float) -> CandidateResult:
    steps = tuple(end - INTERVAL * number for number in reversed(range(count)))
    coefficients = tuple(float(c) for c in merge_coefficients(curve, steps=list(steps)))
    age = sum(c * (end - step) for c, step in zip(coefficients, steps, strict=True))
    return CandidateResult(
        name=f"last{count}-{curve}@{end}", kind="merge", end=span(end), window=span(INTERVAL * count),
        fraction=INTERVAL * count / end, curve=curve, spread="wsm", steps=steps,
        tokens=tuple(step * TOKENS_PER_STEP for step in steps), coefficients=coefficients, mean_age=span(age),
        deviation=span(INTERVAL), ess=1 / sum(c * c for c in coefficients), metrics=metrics(loss), seconds=11.0,
    )  # fmt: skip


def metrics(loss: float) -> dict[str, Metric]:
    return {
        "loss": Metric(value=loss, error=0.011, unit="nats/token"),
        "bits_per_byte": Metric(value=loss / 3.1, error=0.004, unit="bits/byte"),
    }


def made_tuning(run: str = "/data/run") -> TuningResult:
    """72 merges, 33 raw checkpoints of which one has diverged, a decayed branch, and a merge that failed."""
    rng = random.Random(0)
    candidates = [
        merge_candidate(end, curve, count, _loss(end, count) + extra + rng.gauss(0, 0.0005))
        for end in ENDS
        for curve, extra in (("linear", 0.0), ("1-sqrt", 0.004), ("cosine", 0.008))
        for count in WINDOWS
    ]
    for end in range(12_000, 20_001, INTERVAL):
        loss = 9.7 if end == 17_000 else _loss(end, 1) + rng.gauss(0, 0.004)
        candidates.append(
            CandidateResult(
                name=f"step{end}",
                kind="raw",
                end=span(end),
                window=span(0),
                steps=(end,),
                tokens=(end * TOKENS_PER_STEP,),
                coefficients=(1.0,),
                metrics=metrics(loss),
                seconds=10.0,
            )
        )
    candidates.append(CandidateResult(name="decayed branch", kind="baseline", metrics=metrics(3.155), seconds=9.0))
    best = min(candidates, key=lambda c: c.metrics["loss"].value)
    candidates = [_compared(candidate, best) for candidate in candidates]
    candidates.append(CandidateResult(name="last32-ema@20000", kind="merge", failure="exit code 137, three times"))
    return TuningResult(
        run=run, metric="loss", unit="nats/token", data="wiki.bin, code.bin: 512 blocks, 1,048,576 tokens",
        run_length=span(20_000), candidates=tuple(candidates), waiting=("last64-linear@20000",), read_bytes=123 << 30,
        seconds={"merge": 340.0, "evaluate": 1200.0, "export": 60.0},
        recommendation=Recommendation(
            name="last8-linear@20000", best=best.name, raw="step20000",
            sentence="Use last8-linear@20000: the shortest window within one paired standard error of the best.",
            confirmed=Metric(value=3.14, error=0.012), confirmed_raw=Metric(value=3.2, error=0.012),
            warnings=("last32-linear@20000 is long and flat: ask it to generate.",),
        ),
    )  # fmt: skip


def _loss(end: int, count: int) -> float:
    return 3.28 - 0.1 * math.log(end / 16_000) - (0.0 if count == 1 else 0.13 * math.exp(-(math.log(count / 14) ** 2)))


def _compared(candidate: CandidateResult, best: CandidateResult) -> CandidateResult:
    value = candidate.metrics["loss"].value - best.metrics["loss"].value
    return candidate.model_copy(update={"difference": Difference(value=value, error=0.0015 if value else 0.0)})


def evaluation(
    name: str,
    nats: list[float],
    *,
    kind: Literal["merge", "checkpoint", "folder"] = "merge",
    steps: tuple[int, ...] = (),
    coefficients: tuple[float, ...] | None = None,
    **fields: Any,
) -> Evaluation:
    """A loss of 10 tokens a block."""
    given = coefficients or (1 / len(steps),) * len(steps) if steps else ()
    sources = tuple(
        SubjectSource(tag=f"global_step{step}", step=step, coefficient=c) for step, c in zip(steps, given, strict=True)
    )
    identity = hashlib.sha256(name.encode()).hexdigest()
    blocks = Blocks(sources=("wiki",), source=(0,) * len(nats), nats=tuple(nats), tokens=(10,) * len(nats))
    loss = Metric(value=sum(nats) / (10 * len(nats)), error=0.01, unit="nats/token")
    values: dict[str, Any] = {
        "subject": Subject(name=name, kind=kind, identity=identity, path=f"/merges/{name}", sources=sources),
        "evaluator": {"kind": "loss", "identity": "f" * 64},
        "metrics": {"loss": loss},
        "blocks": blocks,
        "seconds": 2.0,
    }
    return Evaluation(**(values | fields))


def put_measurements(folder: Path) -> None:
    """What a tuning leaves in TUNE, and evaluations in MERGES and RUN, of models that are not there."""
    for name in ("TUNE", "MERGES", "RUN"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "TUNE/tuning.json").write_text(made_tuning().model_dump_json())
    records = [evaluation("step4", [30.0], kind="checkpoint", steps=(4,)), evaluation("last2", [29.0], steps=(4, 6))]
    text = "".join(f"{record.model_dump_json()}\n" for record in records)
    for name in ("MERGES", "RUN"):
        (folder / name / "evaluations.jsonl").write_text(text)

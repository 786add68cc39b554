"""Who wrote a block seals it, and a rank of an earlier attempt that lives on is not written over."""

import threading
import time
from pathlib import Path

import pytest

from wsm_ds.engine import journal
from wsm_ds.engine.journal import Journal, read_journals
from wsm_ds.engine.seals import Seal
from wsm_ds.engine.staged_files import StagedFiles
from wsm_ds.errors import OutputLocked, PeerFailed
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import merge, run_plan
from wsm_ds.planning.recipe import make_recipe
from wsm_ds.publishing.staging_folder import Staging
from wsm_ds.verification import verify

RUN = Path(__file__).parents[1] / "golden" / "zero2_bf16"


def unfinished(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the staging folder of a merge of RUN's two checkpoints to `out`."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StagedFiles, "seal_rest", killed)
        with pytest.raises(KeyboardInterrupt):
            run_plan(plan_merge(make_recipe(run=RUN, last=2, out=out)))


def test_a_merge_does_not_begin_while_a_rank_of_an_earlier_attempt_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    unfinished(out, monkeypatch)
    orphan = Journal(Staging(out).folder, 1)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "ORPHANS_END_S", 0.3)
        for restart in (False, True):
            with pytest.raises(OutputLocked, match=r"journal\.1 is being written by a rank of an earlier start"):
                run_plan(plan_merge(make_recipe(run=RUN, last=2, out=out)), restart=restart)
        with pytest.raises(OutputLocked, match=r"journal\.1"):
            Journal(Staging(out).folder, 1)
    began_s = time.monotonic()
    threading.Timer(1.0, orphan.close).start()
    merge(run=RUN, last=2, out=out)
    assert time.monotonic() - began_s >= 1.0
    assert verify(out, full=True).recomputed_bytes > 0


def test_a_block_that_two_ranks_have_sealed_with_different_bytes_counts_as_not_sealed(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, 0), Journal(tmp_path, 1)
    one, other = Seal(b"1" * 16, (1,)), Seal(b"2" * 16, (1,))
    first.add(("a", 0), one)
    first.add(("a", 1), one)
    second.add(("a", 1), other)
    second.add(("a", 2), other)
    first.add(("a", 2), other)
    assert read_journals(tmp_path) == {("a", 0): one, ("a", 2): other}


def test_a_file_with_a_block_that_nobody_sealed_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StagedFiles, "seal_rest", lambda *_: None)
    monkeypatch.setattr("wsm_ds.engine.staged_files.StagedFiles._seal", lambda *_: None)
    with pytest.raises(PeerFailed, match=r"mp_rank_00_model_states\.pt: the ranks have not sealed, .* its blocks 0\."):
        merge(run=RUN, last=2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""Ranks verify an output together: rank 0 prints, and what one of them finds ends all."""

import os
import subprocess
import sys
from pathlib import Path

from forked import free_port

from wsm_ds.merging import merge
from wsm_ds.verification import verify

CODE = "import sys; from wsm_ds.cli import main; sys.exit(main(sys.argv[1:]))"


def verified(out: Path, world_size: int, *flags: str) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of every rank."""
    meeting = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, "verify", str(out), *flags],
            env=os.environ | meeting | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def test_rank_0_prints_and_a_wrong_byte_or_a_lost_source_ends_all(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(run=runs / "w2_s3_bf16", last=3, out=out)
    alone = verify(out, full=True)
    (first, text, _), (second, silent, _) = verified(out, 2, "--full", "--threads", "2")
    assert (first, second, silent) == (0, 0, "")
    assert f"{alone.files} files" in text
    assert "from the sources by rank 0 of 2: identical" in text
    victim = out / "global_step6/zero_pp_rank_1_mp_rank_00_model_states.pt"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = verified(out, 2)
    assert all(code for code, _, _ in done)
    assert all(f"{victim.name} is not what was written" in error for _, _, error in done)
    assert [text for _, text, _ in done] == ["", ""]

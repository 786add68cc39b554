"""What is read and written again is the same to torch."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import pytest
from lazy import torch
from reference import same_tree

from wsm_ds.outputs.torch_template import Inputs, make_torch_template
from wsm_ds.planning.plan import CopySegment, InputNumber, LiteralSegment
from wsm_ds.torchfile import open_own_tree, open_torch_file
from wsm_ds.torchfile.repickle import repickle


def rewritten_file(source: Path, target: Path) -> Path:
    """`source`, its pickle written anew by us and its zip framed anew by us."""
    file = open_own_tree(source)
    data = source.read_bytes()
    contents = {name: data[r.offset : r.offset + r.nbytes] for name, r in file.archive.records.items()}
    inputs = Inputs({str(source): file.archive}, {str(source): InputNumber(0)})
    template = make_torch_template(source.name, file.tree, file.archive, inputs, frozenset()).template
    out = bytearray(template.nbytes)
    for piece in template.segments:
        if isinstance(piece, LiteralSegment):
            out[piece.offset : piece.offset + piece.nbytes] = piece.data
        else:
            assert isinstance(piece, CopySegment)
            out[piece.offset : piece.offset + piece.nbytes] = data[piece.source_offset :][: piece.nbytes]
    for crc in template.crc_fields:
        for offset in crc.crc_offsets:
            out[offset : offset + 4] = zlib.crc32(out[crc.offset : crc.offset + crc.nbytes]).to_bytes(4, "little")
    target.write_bytes(out)
    assert len(contents) == len(open_torch_file(target).archive.records)
    return target


@pytest.mark.parametrize("run", ["w2_s1_fp16", "w2_s2_bf16", "w2_s3_bf16"])
def test_every_file_of_a_real_checkpoint_survives_a_rewrite(runs: Path, tmp_path: Path, run: str) -> None:
    for number, path in enumerate(sorted((runs / run / "global_step6").iterdir())):
        copy = rewritten_file(path, tmp_path / f"{number}.pt")
        assert same_tree(torch.load(path, weights_only=False), torch.load(copy, weights_only=False))
        with zipfile.ZipFile(copy) as archive:
            assert archive.testzip() is None  # all CRC-32s are right
        assert all(r.offset % 64 == 0 for r in open_torch_file(copy).archive.records.values())


def test_only_storages_that_are_still_named_are_kept(runs: Path) -> None:
    path = next((runs / "w2_s2_bf16/global_step6").glob("*rank_0*optim_states.pt"))
    tree = open_own_tree(path).tree
    assert len(repickle(tree)[1]) == 8  # two groups: master, two moments, step
    tree["optimizer_state_dict"]["base_optimizer_state"]["state"].clear()
    assert len(repickle(tree)[1]) == 2

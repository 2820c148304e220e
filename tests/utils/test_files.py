"""A file is there whole or not at all, after a crash too; a damaged archive is told from a sound one."""

from __future__ import annotations

import errno
import os
import random
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from regpipe.engines import checkpoints
from regpipe.engines.inferers import require_model, trained_structures, trained_weights
from regpipe.networks import weights
from regpipe.networks.weights import read_state_dict
from regpipe.utils import files
from regpipe.utils.errors import InputError, explain


def test_the_data_reach_the_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch) -> None:
    seen, fsync, replace = [], os.fsync, os.replace

    def watched(handle: int) -> None:
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        seen.append("folder" if folder else f"file of {os.fstat(handle).st_size} bytes")
        fsync(handle)

    def renamed(*paths: Path) -> None:
        seen.append("renamed")
        replace(*paths)

    monkeypatch.setattr(files.os, "fsync", watched)
    monkeypatch.setattr(files.os, "replace", renamed)
    files.replace_file(tmp_path / "file", b"content")
    assert seen == ["file of 7 bytes", "renamed", "folder"]


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "the right to it")])
def test_what_the_system_refuses_is_told_with_the_files_own_name_and_a_remedy(
    tmp_path, monkeypatch, number, remedy
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "what lies aside")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError) as caught:
        files.replace_file(tmp_path / "file", b"content")
    told = explain(caught.value) or ""
    assert told.startswith(f"{tmp_path / 'file'}: {os.strerror(number)}; ") and remedy in told
    assert not list(tmp_path.iterdir())


def test_a_current_folder_that_was_deleted_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        Path("a").absolute()
    assert explain(caught.value) == "the current folder: was deleted; change to one that is there"


def test_what_a_killed_process_left_aside_is_swept_and_nothing_else(tmp_path) -> None:
    left, kept = {".model.pt.123", ".checkpoint_3.pt.77"}, {"model.pt", ".hidden", ".model.pt.bak", "model.pt.123"}
    for name in left | kept:
        (tmp_path / name).touch()
    files.sweep(tmp_path, "model.pt", "checkpoint_*.pt")
    assert {path.name for path in tmp_path.iterdir()} == kept


WEIGHT = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
STATE: dict[str, Any] = {"weight": WEIGHT, "steps": [1, 2], "of": {"name": "x"}}


def test_each_turned_bit_of_a_saved_state_is_noticed_or_changes_nothing(tmp_path) -> None:
    path = tmp_path / "checkpoint_1.pt"
    files.save_tensors(path, STATE)
    sound, rng, noticed = path.read_bytes(), random.Random(0), 0
    for place in rng.sample(range(len(sound)), 400):
        turned = bytearray(sound)
        turned[place] ^= 1 << rng.randrange(8)
        path.write_bytes(turned)
        try:
            _, found = checkpoints.newest(tmp_path) or (None, {})
        except InputError as problem:
            noticed += 1
            assert str(path) in str(problem) and "damaged" in str(problem)
        else:  # in what fills the gaps between parts, or a date
            assert torch.equal(found["weight"], STATE["weight"])
            assert found["steps"] == STATE["steps"] and found["of"] == STATE["of"]
    assert noticed > 100


def test_torch_itself_takes_a_turned_bit_for_a_weight(tmp_path) -> None:
    """Why there is a check at all."""
    path = tmp_path / "model.pt"
    turn_a_weight(path, STATE)
    assert not torch.equal(torch.load(path, weights_only=True)["weight"], STATE["weight"])
    assert files.damage(path) == "the checksum of its part 0 does not hold"


def turn_a_weight(path: Path, state: dict) -> None:
    files.save_tensors(path, state)
    with zipfile.ZipFile(path) as archive:
        part = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    raw = bytearray(path.read_bytes())
    raw[raw.index(state["weight"].numpy().tobytes()[:16], part.header_offset) + 2] ^= 64
    path.write_bytes(raw)


@pytest.mark.parametrize("ask", [trained_structures, trained_weights, require_model])
def test_a_damaged_model_is_refused_wherever_it_is_asked_for(tmp_path, ask) -> None:
    turn_a_weight(tmp_path / "model.pt", {"weight": STATE["weight"]})
    with pytest.raises(InputError, match=r"model\.pt: damaged \(the checksum .* copy it again .* or train again$"):
        ask(str(tmp_path))
    (tmp_path / "model.pt").write_bytes(b"half")
    with pytest.raises(InputError, match=r"model\.pt: damaged \(File is not a zip file\)"):
        ask(str(tmp_path))


def test_a_model_that_is_read_is_looked_through_once(tmp_path, monkeypatch) -> None:
    network = torch.nn.Linear(4, 6)
    files.save_tensors(tmp_path / "model.pt", network.state_dict())
    looks: list[Path] = []
    monkeypatch.setattr(weights, "damage", lambda path: looks.append(Path(path)))
    for ask in (trained_structures, require_model, lambda folder: require_model(folder, network)):
        ask(str(tmp_path))
        assert looks == [tmp_path / "model.pt"]
        looks.clear()


def test_damaged_weights_to_transfer_are_refused_and_those_of_old_torch_taken(tmp_path) -> None:
    turn_a_weight(tmp_path / "weights.pt", {"weight": STATE["weight"]})
    with pytest.raises(InputError, match=r"weights\.pt: damaged"):
        read_state_dict(tmp_path / "weights.pt")
    old = {"weight": STATE["weight"]}
    torch.save(old, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict(tmp_path / "old.pt")["weight"], STATE["weight"])


def test_two_states_are_kept_and_none_is_deleted_before_the_next_is_written(tmp_path, monkeypatch) -> None:
    for epoch in (9, 10, 11):
        checkpoints.save(tmp_path, epoch, {"progress": {"seconds": float(epoch)}})
    assert [path.stem for path in checkpoints.saved_states(tmp_path)] == ["checkpoint_10", "checkpoint_11"]
    (tmp_path / "checkpoint_9.pt").touch()  # killed before it was deleted
    checkpoints.prune(tmp_path / "checkpoint_10.pt")
    assert len(checkpoints.saved_states(tmp_path)) == 3  # the newest may be damaged
    checkpoints.prune(tmp_path / "checkpoint_11.pt")
    assert [path.stem for path in checkpoints.saved_states(tmp_path)] == ["checkpoint_10", "checkpoint_11"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"checkpoint_12\.pt"):
        checkpoints.save(tmp_path, 12, STATE)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint_10.pt", "checkpoint_11.pt"]
    assert checkpoints.training_seconds(tmp_path) == 11
    for path in tmp_path.iterdir():
        path.write_bytes(b"half")
    assert checkpoints.training_seconds(tmp_path) != checkpoints.training_seconds(tmp_path)  # NaN: not known


def test_files_written_together_are_on_the_disk_at_the_end_each_once(tmp_path, monkeypatch) -> None:
    real, synced = os.fsync, []

    def fsync(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.removesuffix(" (deleted)"))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with files.written_together():
        for name in ("a", "b"):
            files.replace_file(tmp_path / "in" / name, name.encode())
        assert synced == [] and (tmp_path / "in" / "b").read_bytes() == b"b"
    assert synced == ["a", "b", "in"]
    files.replace_file(tmp_path / "last", b"c")
    assert synced[3:] == [f".last.{os.getpid()}", tmp_path.name]


def test_a_disk_that_is_full_at_the_end_names_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match=f"full: '{tmp_path / 'a'}'"), files.written_together():
        files.replace_file(tmp_path / "a", b"new")
    with pytest.raises(KeyError), files.written_together():  # an error within is told, and none is waited for
        files.replace_file(tmp_path / "a", b"new")
        raise KeyError

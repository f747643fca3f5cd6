"""Checkpoints: exact, on any number of ranks, whole or not there at all, and never code."""

import errno
import functools
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mixer.core.errors import CheckpointError, ConfigError, DamagedError
from mixer.core.plan import Cursor
from mixer.training import checkpoint, checkpoint_folder
from mixer.training.checkpoint import CheckpointOptions, Checkpoints, Saved, find, load_model
from tests.training import ranks
from tests.training.making import tiny
from tests.training.ranks import Run, differences

SAVED = Saved(Cursor(1, 2), torch.tensor([[2**60, 5], [7, 0]]), 4_096, {"name": "x", "list": [1, 0.1, None]})


def save(run: Run, folder: Path, steps: int = 18, saved: Saved = SAVED, **options: Any) -> Path:
    keeper = Checkpoints(folder, options=CheckpointOptions(**options))
    keeper.save(run.model, run.optimizer, saved, geometry_steps=steps, wait=True)
    return folder / f"{steps:09d}"


def load(path: Path, seed: int = 9) -> tuple[Run, Saved]:
    run = Run(seed=seed)
    return run, Checkpoints(path.parent).load(path, run.model, run.optimizer)


def weights_of(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if "/" not in name}


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


@pytest.fixture(scope="module")
def trained() -> Run:
    torch.set_num_threads(1)
    return Run().train(2)


# --- what is saved is what is loaded ------------------------------------------------------------------


def round_trip(rank: int, world_size: int, group: Any, folder: Path, kind: str) -> dict[str, Any]:
    """Train 3, save without waiting, train 3 more; beside it load and train 3 more."""
    run = Run(kind, rank, world_size).train(3)
    keeper = Checkpoints(folder, rank=rank, world_size=world_size, group=group)
    then, draws = run.state(), run.draws()
    keeper.save(run.model, run.optimizer, SAVED, geometry_steps=18)
    run.train(3)
    keeper.wait()
    path = keeper.newest()
    assert path is not None

    other = Run(kind, rank, world_size, seed=5).train(1)
    saved = keeper.load(path, other.model, other.optimizer)
    loaded, other.step = other.state(), 3
    assert other.draws() == draws
    other.train(3)
    return {
        "saved": (saved.cursor, saved.sums, saved.tokens, saved.extra),
        "loaded": differences(loaded, then),
        "trained on": differences(other.state(), run.state()),
        "moved": bool(differences(run.state(), then)),
        "draws": (other.draws() == run.draws(), draws),
        "state": then,
    }


def reshard(rank: int, world_size: int, group: Any, folder: Path, kind: str) -> tuple[Any, Any]:
    run = Run(kind, rank, world_size, seed=6)
    keeper = Checkpoints(folder, rank=rank, world_size=world_size, group=group)
    found = keeper.load_newest(run.model, run.optimizer)
    assert found is not None
    state, draws = run.state(), run.draws()
    run.step = 3
    run.train(1)
    keeper.save(run.model, run.optimizer, found[1], geometry_steps=19, wait=True)
    return state, draws


@pytest.mark.parametrize(
    ("kind", "world_size", "then"),
    [
        ("plain", 1, [("ddp", 3)]),
        ("ddp", 2, [("plain", 1), ("fsdp", 3)]),
        ("fsdp", 2, [("plain", 1), ("ddp", 2), ("fsdp", 3)]),
    ],
)
def test_a_run_goes_on_exactly_and_on_other_ranks_from_the_same_numbers(tmp_path, kind, world_size, then):
    first = ranks.run(round_trip, world_size, tmp_path / "first", kind)
    for rank in first:
        assert isinstance(rank, dict), rank
        cursor, sums, tokens, extra = rank["saved"]
        assert (cursor, tokens, extra) == (SAVED.cursor, SAVED.tokens, SAVED.extra)
        assert sums.dtype == torch.int64
        assert sums.tolist() == [[2**60, 5], [7, 0]]
        assert rank["loaded"] == []  # the weights at the call, though training went on
        assert rank["moved"]
        assert rank["trained on"] == []
        assert rank["draws"][0]
    state = first[0]["state"]
    assert "layers.0.mlp.up.weight/exp_avg_sq" in state
    assert state["layers.0.mlp.up.weight/step"] == 3
    assert sorted(os.listdir(tmp_path / "first" / "000000018"))[-2] == "checkpoint.json"
    assert len(list((tmp_path / "first" / "000000018").glob("*.data"))) == world_size

    for number, (kind_now, ranks_now) in enumerate(then):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", folder)
        results = ranks.run(reshard, ranks_now, folder, kind_now)
        for result in results:
            assert isinstance(result, tuple), result
            assert differences(result[0], state) == []
        drawn = [result[1] for result in results]
        assert len(set(drawn)) == ranks_now
        both = min(world_size, ranks_now)
        assert drawn[:both] == [rank["draws"][1] for rank in first[:both]]
        assert find(folder) == folder / "000000019"

        weights = Run(seed=7)
        load_model(folder / "000000018", weights.bare)
        assert differences(weights.state(), weights_of(state)) == []


def test_a_model_alone_is_loaded_without_moving_anything_else(tmp_path, trained):
    path = save(trained, tmp_path)
    run = Run(seed=4)
    draws = run.draws()
    saved = load_model(path, run.bare)
    assert run.draws() == draws
    assert saved.cursor == Cursor(1, 2)
    assert saved.tokens == 4_096
    assert differences(run.state(), weights_of(trained.state())) == []


def test_an_optimizer_before_its_first_step_is_loaded_as_such(tmp_path):
    run = Run()
    path = save(run, tmp_path, saved=Saved(Cursor()))
    other = Run(seed=3).train(1)
    saved = Checkpoints(tmp_path).load(path, other.model, other.optimizer)
    assert saved == Saved(Cursor(), None, 0, {})
    assert not other.optimizer.state
    other.step = 0
    assert differences(other.train(2).state(), Run().train(2).state()) == []


def test_groups_keep_their_own_numbers_and_say_so(tmp_path, trained, caplog):
    path = save(trained, tmp_path)
    trained.optimizer.param_groups[0]["lr"] = 0.125
    assert trained.optimizer.param_groups[0]["rate_scale"] == 1.0
    run = Run(seed=1)
    run.optimizer.param_groups[0]["weight_decay"] = 0.5
    with caplog.at_level(logging.WARNING):
        Checkpoints(tmp_path).load(save(trained, tmp_path, 19), run.model, run.optimizer)
    assert run.optimizer.param_groups[0]["lr"] == 0.125
    assert run.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert "weight_decay=0.5 (saved with 0.1)" in caplog.text
    assert "betas" not in caplog.text
    assert path.exists()


class Odd(nn.Module):
    """A weight under two names, a buffer, a frozen weight, one that gets no gradient, and bfloat16."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 3, bias=False)
        self.last = nn.Linear(3, 3, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("seen", torch.randint(0, 100, (2,)))
        self.frozen = nn.Parameter(torch.rand(2), requires_grad=False)
        self.unused = nn.Parameter(torch.rand(2))
        self.low = nn.Parameter(torch.rand(3, dtype=torch.bfloat16))
        self.none = nn.Parameter(torch.rand(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) * self.low.float()).sum() + self.none.sum()


def test_shared_frozen_unused_empty_and_low_precision_weights(tmp_path):
    def make(seed: int) -> tuple[Odd, torch.optim.AdamW]:
        model = Odd(seed)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)

    model, optimizer = make(0)
    for _ in range(2):
        model(torch.ones(3)).backward()
        optimizer.step()
    keeper = Checkpoints(tmp_path)
    keeper.save(model, optimizer, SAVED, geometry_steps=1, wait=True)
    other, its = make(1)
    path = tmp_path / "000000001"
    keeper.load(path, other, its)
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert other.last.weight is other.first.weight
    assert other.unused not in its.state
    assert its.state[other.low]["exp_avg"].dtype == torch.bfloat16
    index = json.loads(next(path.glob("index-*.json")).read_text())
    assert [name for name in index if name.startswith("model/") and "weight" in name] == ["model/first.weight"]


# --- whole or not at all ------------------------------------------------------------------------------

CALLS = ("fsync", "replace", "mkdir", "unlink", "rmdir")


def die_everywhere(rank: int, world_size: int, group: Any, folder: Path) -> list[tuple[int, int, list[int], list[str]]]:
    """Save at 16, then at 32 and die at one point after another; each time: how it ended, the newest there is, the
    folders, and what differs from what the newest should hold."""
    first, second = Run().train(1), Run().train(2)
    states = {16: first.state(), 32: second.state()}
    begin = folder / "begin"
    save(first, begin, 16)
    found = []
    for point in range(1_000):
        there = folder / str(point)
        shutil.copytree(begin, there)
        child = os.fork()
        if child == 0:
            die_at(point)
            save(second, there, 32, keep=1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        newest = find(there)
        assert newest is not None
        found.append(
            (code, int(newest.name), steps_in(there), differences(load(newest)[0].state(), states[int(newest.name)]))
        )
        save(second, there, 48)
        rubbish = [file for path in there.iterdir() for file in path.iterdir() if file.name not in names_in(path)]
        assert rubbish == []
        assert 48 in steps_in(there)
        if code == 0:
            return found
    raise AssertionError("it never came to an end")


def names_in(path: Path) -> set[str]:
    return {"checkpoint.json", *json.loads((path / "checkpoint.json").read_text())["checkpoint"]["files"]}


def die_at(point: int) -> None:
    """From now on: SIGKILL before call number `point // 2` that changes the disk, or after it; also between pieces."""
    count = [0]

    def counted(call: Any) -> Any:
        @functools.wraps(call)
        def inner(*args: Any, **kwargs: Any) -> Any:
            here = count[0]
            count[0] += 1
            if 2 * here == point:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*args, **kwargs)
            finally:
                if 2 * here + 1 == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        return inner

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    if point % 7 == 0:  # some of the hundreds of pieces
        checkpoint.checksum = counted(checkpoint.checksum)


def test_a_save_killed_at_any_point_leaves_a_whole_one(tmp_path):
    (found,) = ranks.run(die_everywhere, 1, tmp_path)
    assert isinstance(found, list), found
    assert [code for code, *_ in found] == [-signal.SIGKILL] * (len(found) - 1) + [0]
    assert {newest for _, newest, *_ in found} == {16, 32}
    assert not any(differs for *_, differs in found)
    assert len(found) > 20
    assert found[-1][2] == [32]
    assert any(newest == 16 and there == [16, 32] for _, newest, there, _ in found)


def die_in_second(rank: int, world_size: int, group: Any, folder: Path) -> str:
    run = Run("ddp", rank, world_size).train(1)
    keeper = Checkpoints(folder, rank=rank, world_size=world_size, group=group)
    keeper.save(run.model, run.optimizer, SAVED, geometry_steps=16)
    keeper.wait()
    if rank == 1:
        checkpoint.checksum = lambda data: os.kill(os.getpid(), signal.SIGKILL)
    keeper.save(run.model, run.optimizer, SAVED, geometry_steps=32)
    try:
        keeper.wait()
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_rank_killed_while_all_save_leaves_the_one_before(tmp_path):
    alive, killed = ranks.run(die_in_second, 2, tmp_path)
    assert killed == -signal.SIGKILL
    assert "000000032 was not saved" in alive
    assert find(tmp_path) == tmp_path / "000000016"


def fill(rank: int, world_size: int, group: Any, folder: Path) -> list[Any]:
    run = Run("ddp", rank, world_size).train(1)
    keeper = Checkpoints(folder, rank=rank, world_size=world_size, group=group)
    keeper.save(run.model, run.optimizer, SAVED, geometry_steps=16, wait=True)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    keeper.save(run.model, run.optimizer, SAVED, geometry_steps=32)  # fails behind our back
    said = []
    for _ in range(2):
        try:
            keeper.save(run.model, run.optimizer, SAVED, geometry_steps=48, wait=True)
        except CheckpointError as error:
            said.append(str(error))
    newest, left = keeper.newest(), [file.parent.name for file in folder.glob(f"*/{rank:05d}-*.data")]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    keeper.save(run.model, run.optimizer, SAVED, geometry_steps=48, wait=True)
    return [said, newest, left, keeper.newest()]


def test_a_disk_that_takes_no_more_is_said_at_the_next_call_and_costs_nothing(tmp_path):
    results = ranks.run(fill, 2, tmp_path)
    for result in results:
        assert isinstance(result, list), result
        said, newest, left, then = result
        assert "000000032 was not saved" in said[0]
        assert "000000048 was not saved" in said[1]
        for text in said:
            assert "File too large" in text
            assert "rank 1" in text
        assert newest == tmp_path / "000000016"
        assert left == ["000000016"]  # what failed takes no room
        assert then == tmp_path / "000000048"
    assert steps_in(tmp_path) == [16, 48]


def test_an_error_behind_our_back_is_raised_once_with_path_and_cause(tmp_path, trained, monkeypatch):
    keeper = Checkpoints(tmp_path)

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        keeper.save(trained.model, trained.optimizer, SAVED, geometry_steps=1)
        with pytest.raises(CheckpointError, match=r"000000001 was not saved: .*No space left"):
            keeper.wait()
    keeper.wait()
    keeper.save(trained.model, trained.optimizer, SAVED, geometry_steps=2)
    keeper.save(trained.model, trained.optimizer, SAVED, geometry_steps=3)  # waits for the second
    assert (tmp_path / "000000002" / "checkpoint.json").exists()
    keeper.wait()
    assert steps_in(tmp_path) == [2, 3]


def test_training_on_at_once_does_not_change_what_is_saved(tmp_path):
    run = Run().train(1)
    then, keeper = run.state(), Checkpoints(tmp_path)
    sums = torch.tensor([1, 2])
    for steps in (1, 2):  # the second into the buffers of the first
        extra = {"list": [1]}
        keeper.save(run.model, run.optimizer, Saved(Cursor(), sums, 1, extra), geometry_steps=steps)
        with torch.no_grad():
            for value in [*run.bare.parameters(), *(v for s in run.optimizer.state.values() for v in s.values()), sums]:
                value.zero_()
        extra["list"].append(2)
        torch.rand(3)
        random.random()
        keeper.wait()
        other, saved = load(tmp_path / f"{steps:09d}")
        assert differences(other.state(), then) == []
        assert (saved.sums.tolist(), saved.extra) == ([1, 2], {"list": [1]})  # pyright: ignore[reportOptionalMemberAccess]
        run, sums = Run().train(1), torch.tensor([1, 2])


# --- damage and malice --------------------------------------------------------------------------------


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path, trained, caplog):
    save(trained, tmp_path, 1)
    path = save(trained, tmp_path, 2)
    rng = random.Random(0)
    for file in path.iterdir():
        whole = file.read_bytes()
        places = {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(12))}
        for place in places:
            torn = bytearray(whole)
            torn[place] ^= 1 << rng.randrange(7)
            file.write_bytes(torn)
            caplog.clear()
            try:
                name = Checkpoints(tmp_path).load_newest(*both(Run(seed=1)))[0].name  # pyright: ignore[reportOptionalSubscript]
            except CheckpointError as error:
                assert "has format" in str(error)
                continue
            if name == "000000002" and file.name == "checkpoint.json":
                assert json.loads(torn) == json.loads(whole)  # white space
                continue
            assert name == "000000001", (file, place)
            assert str(file) in caplog.text
        file.write_bytes(whole)
    assert find(tmp_path) == path


def both(run: Run) -> tuple[nn.Module, torch.optim.Optimizer]:
    return run.model, run.optimizer


@pytest.mark.parametrize("how", ["gone", "cut", "empty", "longer"])
@pytest.mark.parametrize("kind", ["*.data", "index-*.json"])
def test_a_newest_without_all_its_bytes_is_named_and_passed_over(tmp_path, trained, caplog, how, kind):
    save(trained, tmp_path, 1)
    file = next(save(trained, tmp_path, 2).glob(kind))
    data = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": data[:-1], "empty": b"", "longer": data + b"x"}[how])
    assert find(tmp_path) == tmp_path / "000000001"
    assert str(file) in caplog.text
    with pytest.raises(DamagedError, match=file.name):
        load(tmp_path / "000000002")
    save(trained, tmp_path, 2)
    assert find(tmp_path) == tmp_path / "000000002"


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_no_pickle_is_written_and_none_is_ever_read(tmp_path, trained):
    marker = tmp_path / "marker"
    bomb = pickle.dumps({"state_dict_metadata": Bomb(marker)})
    pickle.loads(bomb)
    assert marker.exists()  # it would go off
    marker.unlink()

    folder = tmp_path / "run"
    path = save(trained, folder)
    assert {file.name.split("-")[0] for file in path.iterdir()} == {"checkpoint.json", "00000", "index"}
    for file in path.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, EOFError, IndexError, AttributeError)):
            pickle.loads(file.read_bytes())
    (path / ".metadata").write_bytes(bomb)
    (path / "__0_0.distcp").write_bytes(bomb)
    assert differences(load(path)[0].state(), trained.state()) == []
    for file in list(path.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(bomb + bytes(max(0, len(whole) - len(bomb))))
        if not file.name.startswith((".", "__")):
            with pytest.raises(DamagedError):
                load(path)
            with pytest.raises(DamagedError):
                load_model(path, Run().bare)
        file.write_bytes(whole)
    (path / "checkpoint.json").unlink()
    assert find(folder) is None
    assert not marker.exists()


def test_a_record_that_names_other_places_is_refused(tmp_path, trained):
    path = save(trained, tmp_path)
    value = json.loads((path / "checkpoint.json").read_text())
    files = value["checkpoint"]["files"]
    files["../../secret"] = files.pop(next(iter(files)))
    value["checksum"] = checkpoint_folder.checksum(checkpoint_folder._canonical(value["checkpoint"]).encode())
    (path / "checkpoint.json").write_text(json.dumps(value))
    with pytest.raises(DamagedError, match="secret"):
        load(path)


# --- refusals -----------------------------------------------------------------------------------------


def test_a_newer_format_is_refused_and_never_removed(tmp_path, trained):
    path = save(trained, tmp_path, 5)
    value = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps({"format": 2, "other": value}))
    for attempt in (lambda: load(path), lambda: find(tmp_path)):
        with pytest.raises(CheckpointError, match=r"has format 2, and this mixer reads up to 1"):
            attempt()
    save(trained, tmp_path, 6, keep=1)
    assert steps_in(tmp_path) == [5, 6]


def test_another_model_is_refused_with_the_first_differences(tmp_path, trained):
    path = save(trained, tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mlp_dim": 64}, r"model/layers.0.mlp.gate.weight is \[96, 32\] in the checkpoint and \[64, 32\] here"),
        ({"num_layers": 3}, r"model/layers.2.attention.key.weight is missing in the checkpoint.*; and 4 more"),
        ({"num_layers": 1}, r"model/layers.1.attention.key.weight is in the checkpoint alone"),
    ]
    for options, text in cases:
        other = Run("plain", **options)
        before = other.state()
        with pytest.raises(CheckpointError, match=text) as caught:
            Checkpoints(tmp_path).load(path, other.model, other.optimizer)
        assert not isinstance(caught.value, DamagedError)
        with pytest.raises(CheckpointError, match=text):
            load_model(path, other.model)
        assert differences(other.state(), before) == []
    low = tiny(tied=False).bfloat16()
    with pytest.raises(CheckpointError, match=r"is torch.float32 in the checkpoint and torch.bfloat16 here"):
        Checkpoints(tmp_path).load(path, low, torch.optim.AdamW(low.parameters()))
    load_model(path, low)
    assert torch.equal(low.embedding.weight, trained.bare.embedding.weight.bfloat16())  # pyright: ignore


def test_an_optimizer_of_fewer_weights_is_refused(tmp_path, trained):
    path = save(trained, tmp_path)
    model = tiny(tied=False)
    with pytest.raises(CheckpointError, match=r"optimizer/embedding.weight/exp_avg belongs to no parameter"):
        Checkpoints(tmp_path).load(path, model, torch.optim.AdamW(model.layers.parameters()))


def test_options_and_arguments_out_of_range(tmp_path, trained):
    for name in ("keep", "every_windows", "keep_every_windows"):
        options: dict[str, Any] = {name: 0}
        with pytest.raises(ConfigError, match=f"{name}=0; it must be at least 1"):
            CheckpointOptions(**options)
    with pytest.raises(ConfigError, match="2 ranks save together, and no group was given"):
        Checkpoints(tmp_path, world_size=2)
    with pytest.raises(CheckpointError, match="must be plain JSON"):
        save(trained, tmp_path, saved=Saved(Cursor(), extra={"x": object()}))
    assert find(tmp_path / "nowhere") is None
    with pytest.raises(DamagedError, match="nowhere"):
        load_model(tmp_path / "nowhere", trained.bare)


# --- which are kept -----------------------------------------------------------------------------------


def test_the_newest_and_those_kept_for_good_stay(tmp_path, trained):
    for window in range(1, 9):
        save(trained, tmp_path, window * 10, Saved(Cursor(window, 0)), keep=2, keep_every_windows=3)
    assert steps_in(tmp_path) == [30, 60, 70, 80]
    save(trained, tmp_path, 93, Saved(Cursor(9, 3)), keep=2, keep_every_windows=3)
    save(trained, tmp_path, 100, Saved(Cursor(10, 0)), keep=2, keep_every_windows=3)
    save(trained, tmp_path, 110, Saved(Cursor(11, 0)), keep=2, keep_every_windows=3)
    assert steps_in(tmp_path) == [30, 60, 100, 110]  # 93 is inside window 9
    assert find(tmp_path, 99) == tmp_path / "000000060"
    assert find(tmp_path, 60) == tmp_path / "000000060"
    assert find(tmp_path, 29) is None


def test_the_one_just_saved_stays_though_others_have_more_steps(tmp_path, trained):
    for steps in (10, 20, 30):
        save(trained, tmp_path, steps)
    save(trained, tmp_path, 5, keep=1)
    assert steps_in(tmp_path) == [5, 30]


def test_damaged_ones_do_not_push_out_good_ones(tmp_path, trained):
    for steps in (10, 20, 30):
        path = save(trained, tmp_path, steps)
    next(path.glob("*.data")).unlink()
    save(trained, tmp_path, 25, keep=2)
    assert steps_in(tmp_path) == [20, 25, 30]


def test_what_a_killed_save_left_goes_with_the_next_and_strangers_stay(tmp_path, trained):
    path = save(trained, tmp_path, 10)
    left = tmp_path / "000000020"
    left.mkdir()
    for file in (left / "00003-0123abcd.data", path / "00001-0123abcd.data", path / ".checkpoint.json.01ab.tmp"):
        file.write_bytes(b"x")
    (tmp_path / "notes").mkdir()
    (path / "notes.txt").write_text("mine")
    assert find(tmp_path) == path
    save(trained, tmp_path, 30)
    assert sorted(os.listdir(tmp_path)) == ["000000010", "000000030", "notes"]
    assert set(os.listdir(path)) - names_in(path) == {"notes.txt"}


def test_what_cannot_be_removed_is_a_warning(tmp_path, trained, monkeypatch, caplog):
    save(trained, tmp_path, 10)

    unlink = os.unlink

    def refuse(path: Any, **kwargs: Any) -> None:
        if "000000010" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        save(trained, tmp_path, 20, keep=1)
    assert "000000010 is not needed any more and cannot be removed" in caplog.text
    assert find(tmp_path) == tmp_path / "000000020"
    save(trained, tmp_path, 30, keep=1)
    assert steps_in(tmp_path) == [30]


def test_the_same_steps_saved_again_replace_what_was_there(tmp_path, trained):
    other = Run(seed=8)
    path = save(other, tmp_path)
    before = set(os.listdir(path))
    assert save(trained, tmp_path, keep=1) == path
    assert set(os.listdir(path)) & before == {"checkpoint.json"}
    assert len(os.listdir(path)) == 3
    assert differences(load(path)[0].state(), trained.state()) == []

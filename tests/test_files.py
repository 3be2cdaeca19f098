"""What lies on a disk is whole, has one writer and is checked before use: crashes, full disks, damaged bytes."""

import errno
import itertools
import json
import os
import pickle
import random
import signal
import stat
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dilated_attention_nb import files
from dilated_attention_nb.files import Lines, open_tensors, owned, read_json, read_lines, write_file, write_tensors
from dilated_attention_nb.longnet import LongNet, LongNetConfig, longnet_tiny
from dilated_attention_nb.plotting import plot_branches, save_figure
from dilated_attention_nb.pretrained import from_pretrained, read_tensors, save_pretrained

POSIX = pytest.mark.skipif(os.name != "posix", reason="flock, fork, pipes and limits of POSIX")


def forked(work) -> int:
    "The number of a child that does this and ends."
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def listed(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def damaged(read, path: Path) -> str:
    "The message with which `read(path)` refuses a file; it names the file."
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(path) in str(caught.value), caught.value
    return str(caught.value)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with open_tensors(path) as file:
        return file.tensors()


# ---- one writer ------------------------------------------------------------------------------------------------------


@POSIX
def test_symbolic_links_are_never_written_through(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for name in ("state.json", "state.json.part", "model.safetensors.part", "rows.jsonl"):
        (tmp_path / name).symlink_to(mine)
    write_file(tmp_path / "state.json", b"new")
    write_tensors(tmp_path / "model.safetensors", {"x": torch.ones(2)}, {})
    with pytest.raises(OSError, match=r"rows.jsonl.*symbolic link"):
        Lines(tmp_path / "rows.jsonl")
    assert mine.read_text() == "mine" and (tmp_path / "state.json").read_bytes() == b"new"
    assert not (tmp_path / "state.json").is_symlink() and (tmp_path / "state.json.part").is_symlink()


@POSIX
def test_names_of_unfinished_files_cannot_be_foreseen_and_must_be_new(tmp_path, monkeypatch):
    seen = []
    real = os.open

    def spying(path, flags, mode=0o777, **rest):
        seen.append((str(path), flags))
        return real(path, flags, mode, **rest)

    monkeypatch.setattr(os, "open", spying)
    write_file(tmp_path / "a", b"1")
    write_file(tmp_path / "a", b"2")
    made = [(path, flags) for path, flags in seen if flags & os.O_CREAT]
    assert len(made) == len({path for path, _ in made}) == 2
    assert all(flags & os.O_EXCL and flags & os.O_NOFOLLOW for _, flags in made)
    assert all(Path(path).parent == tmp_path and "a" != Path(path).name for path, _ in made)


@POSIX
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_the_umasks(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_file(tmp_path / "a", "x")
        write_tensors(tmp_path / "b", {"x": torch.ones(1)}, {})
        with Lines(tmp_path / "c") as lines:
            lines.add(1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "abc"} == {0o666 & ~mask}


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there_and_says_how_to_go_on(call, tmp_path, monkeypatch):
    figure = plot_branches(longnet_tiny().attention_config, n=64, num_heads=2)
    writers = {
        "a.json": lambda path: write_file(path, "x" * 3000),
        "a.safetensors": lambda path: write_tensors(path, {"x": torch.ones(700)}, {}),
        "a.png": lambda path: save_figure(figure, path),
    }
    for name in writers:
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(os, call, full)
    for name, write in writers.items():
        with pytest.raises(OSError, match=f"{name}: its [0-9,]+ bytes can't be written: No space .* do it again") as e:
            write(tmp_path / name)
        assert e.value.errno == errno.ENOSPC and (tmp_path / name).read_text() == "old"
    assert listed(tmp_path) == sorted(writers)


@POSIX
def test_a_disk_that_is_really_full(tmp_path):
    model, log = LongNet(longnet_tiny()), Lines(tmp_path / "rows.jsonl")

    def fill():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        for write in (
            lambda: write_file(tmp_path / "a", b"x" * 5001),
            lambda: write_tensors(tmp_path / "b", {"x": torch.ones(2000)}, {}),
            lambda: save_pretrained(model, tmp_path),
            lambda: [log.add({"row": i}) for i in range(5000)],
        ):
            with pytest.raises(OSError, match=f"{tmp_path}.*bytes can't be written"):
                write()

    assert ended(forked(fill)) == 0
    assert listed(tmp_path) == ["rows.jsonl"]
    rows = read_lines(tmp_path / "rows.jsonl")
    assert len(rows) > 100 and (tmp_path / "rows.jsonl").read_bytes().endswith(b"}\n")  # none of them half


@POSIX
def test_what_a_killed_owner_left_is_swept_away(tmp_path):
    (tmp_path / "a").write_text("old")

    def write_and_die():
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        with owned(tmp_path):
            write_file(tmp_path / "a", b"new")

    assert ended(forked(write_and_die)) == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old" and len(listed(tmp_path)) == 3  # with the lock and the unfinished
    with owned(tmp_path):
        assert listed(tmp_path) == [".lock", "a"]
    assert listed(tmp_path) == ["a"]


def test_lines_come_back_and_a_torn_last_one_does_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_lines(path) == []
    with Lines(path) as lines:
        lines.add({"step": 0})
        lines.sync()
    with Lines(path) as lines:
        lines.add({"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2')
    assert read_lines(path) == [{"step": 0}, {"step": 1}]
    for row in ({"step": 2}, {"step": 3}):  # not behind the torn one
        with Lines(path) as lines:
            lines.add(row)
    assert [row["step"] for row in read_lines(path)] == [0, 1, 2, 3]
    path.write_text("no json\n")
    assert "no JSON" in damaged(read_lines, path)


# ---- one owner -------------------------------------------------------------------------------------------------------


@contextmanager
def owner(folder: Path):
    "The number of another process that owns a folder; it is killed at the end."
    (read, write), (idle, _) = os.pipe(), os.pipe()

    def own():
        with owned(folder):
            os.write(write, b"mine")
            os.read(idle, 1)  # nothing ever comes

    child = forked(own)
    assert os.read(read, 4) == b"mine"
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)


@POSIX
def test_a_second_owner_is_refused_with_the_number_of_the_first_until_that_is_dead(tmp_path):
    with owner(tmp_path) as pid:
        for _ in range(2):
            with pytest.raises(ValueError, match=f"process {pid} writes; wait until it ends"):
                with owned(tmp_path):
                    pass
        with pytest.raises(ValueError, match=f"process {pid}"):  # a run is not waited for
            save_pretrained(LongNet(longnet_tiny()), tmp_path)
    with owned(tmp_path), owned(str(tmp_path)):
        pass
    assert listed(tmp_path) == []


@POSIX
def test_a_forked_child_owns_nothing_and_keeps_nothing(tmp_path):
    (said, say), (idle, keep) = os.pipe(), os.pipe()

    def own_and_die():
        with owned(tmp_path):
            forked(outlive)
            signal.pause()  # until the child kills it

    def outlive():
        with pytest.raises(ValueError, match=f"process {os.getppid()}"), owned(tmp_path):
            pass
        os.close(keep)
        os.write(say, b"refused")
        os.kill(os.getppid(), signal.SIGKILL)
        os.read(idle, 1)  # lives on after its parent, until the test closes the pipe

    assert ended(forked(own_and_die)) == -signal.SIGKILL
    assert os.read(said, 7) == b"refused"
    with owned(tmp_path):
        assert listed(tmp_path) == [".lock"]
    os.close(keep)


def test_threads_take_turns_or_are_refused(tmp_path):
    log, barrier = [], threading.Barrier(4)

    def save(number):
        barrier.wait()
        with owned(tmp_path, wait=True):
            log.append(number)
            log.append(number)

    threads = [threading.Thread(target=save, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log[::2] == log[1::2] and sorted(log[::2]) == [0, 1, 2, 3]
    with owned(tmp_path):
        said = []

        def refused():
            for wait in (False, True):
                try:
                    with owned(tmp_path, wait):
                        said.append("two owners")
                except ValueError as error:
                    said.append(str(os.getpid()) in str(error))

        thread = threading.Thread(target=refused)
        thread.start()
        thread.join()
    assert said == [True, True] and listed(tmp_path) == []


@POSIX
def test_file_systems_without_locks_are_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files._flock, "flock", refuse)
    with pytest.warns(UserWarning, match=f"{tmp_path} can't be locked .*No locks available.*no other process"):
        with owned(tmp_path):
            write_file(tmp_path / "a", "x")
    monkeypatch.setattr(files, "_flock", None)
    with pytest.warns(UserWarning, match="no flock"), owned(tmp_path):
        pass
    assert listed(tmp_path) == ["a"]


# ---- one model in a folder -------------------------------------------------------------------------------------------


def marked(seed: int) -> LongNet:
    "A model whose config and numbers both say which one it is."
    mixing = ("softmax", "groups")[seed % 2]
    model = LongNet(longnet_tiny(num_layers=1 + seed % 2, mixing=mixing, layer_norm_eps=1e-5 * seed))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(seed)
    return model


def mark_of(model: LongNet) -> int:
    "Which one it is, as the numbers say; the config must say the same."
    (seed,) = {int(x) for p in model.parameters() for x in p.detach().unique()}
    assert model.config == marked(seed).config
    return seed


@POSIX
def test_models_saved_at_the_same_time_are_each_whole(tmp_path):
    models = [marked(seed) for seed in (1, 2, 3)]

    def save(model):
        for _ in range(6):
            save_pretrained(model, tmp_path)

    save_pretrained(models[0], tmp_path)
    children = [forked(lambda model=model: save(model)) for model in models]
    seen = {mark_of(from_pretrained(tmp_path)) for _ in range(20)}
    assert seen <= {1, 2, 3} and [ended(child) for child in children] == [0, 0, 0]
    assert listed(tmp_path) == ["config.json", "model.safetensors"]
    assert mark_of(from_pretrained(tmp_path)) in (1, 2, 3)


@POSIX
@pytest.mark.parametrize("renames", [1, 2])
@pytest.mark.parametrize("empty", [True, False])
def test_a_saver_that_is_killed_leaves_the_old_model_or_the_new(renames, empty, tmp_path):
    if not empty:
        save_pretrained(marked(1), tmp_path)

    def save_and_die():
        real, count = os.replace, itertools.count(1)
        os.replace = lambda *paths: os.kill(os.getpid(), 9) if next(count) == renames else real(*paths)
        save_pretrained(marked(2), tmp_path)

    assert ended(forked(save_and_die)) == -signal.SIGKILL
    if empty and renames == 1:
        with pytest.raises(FileNotFoundError):
            from_pretrained(tmp_path)
    else:
        assert mark_of(from_pretrained(tmp_path)) == renames  # of the file of tensors, which has its config with it
    save_pretrained(marked(3), tmp_path)  # goes on, and sweeps
    assert mark_of(from_pretrained(tmp_path)) == 3 and listed(tmp_path) == ["config.json", "model.safetensors"]


def test_a_config_that_is_not_of_these_weights_is_refused(tmp_path):
    for name, values in {"a": {}, "b": {"mixing": "groups"}}.items():
        save_pretrained(LongNet(longnet_tiny(**values)), tmp_path / name)
    (tmp_path / "a/config.json").write_bytes((tmp_path / "b/config.json").read_bytes())
    with pytest.raises(ValueError, match="config.json must be the one that model.safetensors was saved with"):
        LongNet.from_pretrained(tmp_path / "a")


def test_folders_of_version_0_1_are_read_with_a_word(tmp_path):
    model = LongNet(longnet_tiny())
    about = {"class": "LongNet", "config": model.config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(about, indent=2))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"model.safetensors has no config of its own"):
        again = LongNet.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


# ---- sizes are read before anything is made --------------------------------------------------------------------------


def absurd(path: Path, **values) -> None:
    about = json.loads(path.read_text())
    about["config"] |= values
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    "values",
    [{"num_layers": 10**9}, {"num_layers": 9_999}, {"vocab_size": 10**18}, {"vocab_size": 2**31}, {"embed_dim": 10**9},
     {"embed_dim": 2**20, "num_heads": 2**13}, {"num_heads": 10**9}, {"ffn_dim": 10**12}, {"ffn_dim": 2**22},
     {"num_layers": 10**4000}, {"segment_lengths": [2**60], "dilation_rates": [1]}],
)  # fmt: skip
def test_absurd_models_are_refused_at_once(values, tmp_path):
    save_pretrained(LongNet(longnet_tiny()), tmp_path)
    absurd(tmp_path / "config.json", **values)
    begin = os.times()
    with pytest.raises(ValueError, match=r"config.json|model.safetensors"):
        LongNet.from_pretrained(tmp_path)
    spent = os.times()
    assert spent.user + spent.system - begin.user - begin.system < 1  # of the processor, whatever else runs


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 10**5, '{"a":' * 10**5 + "1" + "}" * 10**5, "9" * 10**4, "\ufeff{}", "[1] 2", "nul", '{"a": 1,}'],
    ids=list("abcdefghi"),
)
def test_json_that_is_none(text, tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    damaged(read_json, tmp_path / "a.json")


@POSIX
def test_what_is_no_file_is_not_read(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    for name in ("folder.pth", "pipe.pth"):
        for read in (read_json, tensors_of, read_tensors, read_lines):
            assert "no file" in damaged(read, tmp_path / name)
    damaged(read_json, tmp_path / "latin.json")
    for read in (read_json, tensors_of, read_tensors):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nowhere")
    (tmp_path / "long.json").write_text("[" + "1," * 1000 + "1]")
    with pytest.raises(ValueError, match="more than the 100 that"):
        read_json(tmp_path / "long.json", 100)


def header_file(path: Path, header: object, numbers: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    return path


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = [
    [], 3, None, {"x": 3}, {"x": []}, {"x": {}}, {"__metadata__": 3, "x": X}, {"__metadata__": {"a": 1}, "x": X},
    {"x": X | {"dtype": "F33"}}, {"x": X | {"dtype": 3}}, {"x": X | {"shape": 2}}, {"x": X | {"shape": [-2]}},
    {"x": X | {"shape": [2.0]}}, {"x": X | {"shape": [True, 2]}}, {"x": X | {"shape": [3]}},
    {"x": X | {"shape": [10**18]}}, {"x": X | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}},
    {"x": X | {"shape": [1] * 10**4}}, {"x": X | {"data_offsets": [0]}}, {"x": X | {"data_offsets": [0, 16]}},
    {"x": X | {"data_offsets": [4, 12]}}, {"x": X | {"data_offsets": [8, 0]}}, {"x": X, "y": X},
    {"x": X | {"shape": [10**4000]}}, {}, b"\xff" * 20, b"[" * 10**5, b"",
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=[str(i) for i in range(len(HEADERS))])
def test_headers_that_lie_are_refused(header, tmp_path):
    path = header_file(tmp_path / "a.safetensors", header, bytes(8))
    for read in (tensors_of, read_tensors):
        assert "can't be read" in damaged(read, path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 10**8, 9, 3])
def test_a_header_longer_than_its_file(length, tmp_path):
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + b"{}")
    damaged(tensors_of, tmp_path / "a")


def test_headers_are_read_as_safetensors_does(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    tensors = {str(d): torch.arange(6).view(2, 3).to(d) for d in (*dtypes, torch.int8, torch.uint8, torch.bool)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "a")
    write_tensors(tmp_path / "b", tensors, {"x": "y"})
    for name in "ab":
        with open_tensors(tmp_path / name) as file:
            assert {n: (x.dtype, x.shape) for n, x in file.shapes.items()} == {
                n: (x.dtype, x.shape) for n, x in tensors.items()
            }
            again = file.tensors()
            assert file.hashed == (name == "b")
        theirs = load_file(tmp_path / name)
        assert again.keys() == theirs.keys() == tensors.keys()
        assert all(torch.equal(again[n], x) and torch.equal(theirs[n], x) for n, x in tensors.items())


def damages(data: bytes, count: int) -> list[bytes]:
    "Copies with a flipped bit, a byte changed, cut off, or a piece twice, in places drawn once for all."
    draw, copies = random.Random(0), []
    for _ in range(count):
        at = draw.randrange(min(len(data), 3000)) if draw.random() < 0.5 else draw.randrange(len(data))
        copies.append(data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :])
        copies.append(data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :])
        copies.append(data[:at])
        copies.append(data[: at + 7] + data[at:])
    return [copy for copy in copies if copy != data]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_damage_to_a_saved_model_is_read_or_raises_anything_else(name, tmp_path):
    model = LongNet(LongNetConfig(16, 1, 2, (8,), (1,), vocab_size=8))
    save_pretrained(model, tmp_path)
    whole, taken = (tmp_path / name).read_bytes(), 0
    for copy in damages(whole, 60):
        (tmp_path / name).write_bytes(copy)
        try:
            again = from_pretrained(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error), error
        else:  # white space in JSON, or the word for the hash: nothing that counts
            taken += 1
            assert again.config == model.config
            assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))
    assert taken < 30


def test_no_damage_to_a_pickled_file_raises_anything_else(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": {"weight": torch.arange(100.0)}}, path)
    whole = path.read_bytes()
    for copy in damages(whole, 60):
        path.write_bytes(copy)
        try:
            read_tensors(path)
        except ValueError as error:
            assert str(path) in str(error)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_pickle_runs(tmp_path):
    proof = tmp_path / "proof"
    for name in ("a.pth", "a.pt", "a.safetensors", "a"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(str(proof))))
        damaged(read_tensors, tmp_path / name)
        damaged(read_json, tmp_path / name)
    assert not proof.exists()

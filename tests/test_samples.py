"""Samples in every form a user has: lazily read, checked, gone through again and again."""

from __future__ import annotations

import weakref

import ml_dtypes
import numpy as np
import pytest

from edgepass import sample_sources
from edgepass.errors import CalibrationError, UsageError
from edgepass.npz import write_npz
from edgepass.samples import as_feeds
from edgepass.targets.feed import TensorSpec

X = TensorSpec("x", "float32", ("n", 3))
TOKENS = TensorSpec("tokens", "int64", (1, 2))
STACK = np.arange(24, dtype=np.float32).reshape(8, 3)


def values(feeds) -> list[list[float]]:
    return [feed["x"].reshape(-1).tolist() for feed in feeds]


class Indexed:
    """As a torch `Dataset`: a length and entries, no end that raises IndexError."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": STACK[index % 8][None]}


def make():
    yield from ({"x": row[None]} for row in STACK)


def forms(tmp_path):
    np.savez(tmp_path / "stored.npz", x=STACK)
    np.savez_compressed(tmp_path / "packed.npz", x=STACK)
    np.savez(tmp_path / "fortran.npz", x=np.asfortranarray(STACK))
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, row in enumerate(STACK):
        np.savez(folder / f"{i}.npz", x=row[None])
    np.save(tmp_path / "x.npy", STACK)
    return {
        "list": list(make()),
        "tuples": [(row[None],) for row in STACK],
        "arrays": [row[None] for row in STACK],
        "stack": {"x": STACK},
        "one axis more": {"x": STACK[:, None]},
        "mapped": {"x": np.load(tmp_path / "x.npy", mmap_mode="r")},
        "iterator": make(),
        "function": make,
        "dataset": Indexed(),
        "stored": tmp_path / "stored.npz",
        "packed": str(tmp_path / "packed.npz"),
        "fortran": tmp_path / "fortran.npz",
        "folder": folder,
    }


FORMS = (
    "list",
    "tuples",
    "arrays",
    "stack",
    "one axis more",
    "mapped",
    "iterator",
    "function",
    "dataset",
    "stored",
    "packed",
    "fortran",
    "folder",
)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_sequence(form, tmp_path):
    feeds = as_feeds(forms(tmp_path)[form], [X])
    assert feeds
    assert values([feeds[0]]) == [[0, 1, 2]]
    assert values(feeds) == STACK.tolist()
    assert values(feeds) == STACK.tolist()  # and again
    assert len(feeds) == 8
    assert values([feeds[5], feeds[-1]]) == STACK[[5, 7]].tolist()
    assert values(feeds[2:7:2]) == STACK[2:7:2].tolist()
    assert values(feeds[::-1]) == STACK[::-1].tolist()
    assert len(feeds[:3]) == 3
    assert as_feeds(feeds, [X]) is feeds
    with pytest.raises(IndexError):
        feeds[8]


def test_a_loaders_batches_are_taken_apart_and_its_labels_left_out():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(STACK), torch.arange(8))
    loader = torch.utils.data.DataLoader(data, batch_size=3)
    feeds = as_feeds(loader, [X])
    assert [feed["x"].shape for feed in feeds] == [(1, 3)] * 8
    assert values(feeds) == STACK.tolist()
    assert len(feeds) == 8
    whole = as_feeds(torch.utils.data.DataLoader(data, batch_size=4), [_fixed(4)])
    assert [feed["x"].shape for feed in whole] == [(4, 3)] * 2


def _fixed(rows: int) -> TensorSpec:
    return TensorSpec("x", "float32", (rows, 3))


def test_stacks_of_several_inputs_and_dtypes(tmp_path):
    half = np.arange(12, dtype=np.float32).reshape(4, 3).astype(ml_dtypes.bfloat16)
    tokens = np.arange(8, dtype=np.int64).reshape(4, 2)
    path = tmp_path / "data.npz"
    write_npz(path, {"h": half, "tokens": tokens})
    feeds = as_feeds(path, [TensorSpec("h", "bfloat16", (None, 3)), TOKENS])
    assert len(feeds) == 4
    last = list(feeds)[-1]
    assert last["h"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(last["h"].astype(np.float32), [[9, 10, 11]])
    np.testing.assert_array_equal(last["tokens"], [[6, 7]])


def test_an_iterators_samples_survive_in_a_file(monkeypatch):
    monkeypatch.setattr(sample_sources, "_SPOOLED", 64)
    feeds = as_feeds((dict(feed) for feed in make()), [X])
    assert values(feeds) == values(feeds) == STACK.tolist()
    words = TensorSpec("w", "string", (None,))
    texts = as_feeds(iter([np.array(["a", "long word"], object)] * 2), [words])
    assert [list(feed["w"]) for feed in texts] == [["a", "long word"]] * 2


def test_nothing_is_taken_before_it_is_asked_for():
    taken = []

    def counted():
        for i, feed in enumerate(make()):
            taken.append(i)
            yield feed

    feeds = as_feeds(counted(), [X])
    assert taken == [0]
    assert feeds.known_length is None
    for _ in zip(range(3), feeds, strict=False):
        pass
    assert taken == [0, 1, 2]
    assert len(feeds) == 8


class Living:
    """Makes samples and counts those that are still referred to."""

    def __init__(self, count: int) -> None:
        self.count, self.now, self.most = count, 0, 0

    def __iter__(self):
        for i in range(self.count):
            array = np.full((1, 3), i, np.float32)
            self.now += 1
            self.most = max(self.most, self.now)
            weakref.finalize(array, self._gone)
            yield {"x": array}

    def _gone(self) -> None:
        self.now -= 1


@pytest.mark.parametrize("form", ["object", "function", "iterator"])
def test_as_many_samples_live_of_many_as_of_few(form):
    most = []
    for count in (10, 1000):
        living = Living(count)
        data = {"object": living, "function": lambda it=living: iter(it), "iterator": iter(living)}
        feeds = as_feeds(data[form], [X])
        assert sum(float(feed["x"][0, 0]) for feed in feeds) == sum(range(count))
        most.append(living.most)
    assert most[0] == most[1] <= 3


# --- mistakes ----------------------------------------------------------------------------------


def test_samples_in_memory_are_checked_at_once_and_others_when_used():
    bad = [{"x": row[None]} for row in STACK]
    bad[3] = {"x": np.full((1, 3), np.nan, np.float32)}
    with pytest.raises(CalibrationError, match="sample 3"):
        as_feeds(bad, [X])
    assert len(as_feeds(bad, [X], finite=False)) == 8
    lazy = as_feeds(lambda: iter(bad), [X])
    with pytest.raises(CalibrationError, match="sample 3"):
        list(lazy)


@pytest.mark.parametrize("data", [[], iter([]), lambda: iter([]), {"x": STACK[:0]}])
def test_no_sample_is_an_error(data):
    with pytest.raises(CalibrationError, match="no sample"):
        as_feeds(data, [X])


@pytest.mark.parametrize("data", [3, STACK, lambda: 3])
def test_what_is_no_form_of_samples(data):
    with pytest.raises(CalibrationError, match="Samples can't be a"):
        as_feeds(data, [X])


def test_stacks_that_do_not_fit():
    with pytest.raises(CalibrationError, match="different numbers"):
        as_feeds({"x": STACK, "tokens": np.zeros((3, 2), np.int64)}, [X, TOKENS])
    with pytest.raises(CalibrationError, match="no input 'y'"):
        as_feeds({"x": STACK, "y": STACK}, [X])


def test_files_are_read_without_trust(tmp_path):
    path = tmp_path / "objects.npz"
    np.savez(path, x=np.array([{}], object))
    with pytest.raises(CalibrationError, match="Python objects"):
        as_feeds(path, [X])
    np.savez(tmp_path / "whole.npz", x=STACK)
    data = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(data[:200])
    with pytest.raises(CalibrationError, match="not a readable"):
        as_feeds(tmp_path / "torn.npz", [X])
    at = data.index(STACK.tobytes())
    (tmp_path / "changed.npz").write_bytes(data[:at] + b"!" + data[at + 1 :])
    with pytest.raises(CalibrationError, match="not a readable"):
        list(as_feeds(tmp_path / "changed.npz", [X]))
    with pytest.raises(UsageError, match=r"no \.npz file"):
        as_feeds(tmp_path.joinpath("empty").mkdir() or tmp_path / "empty", [X])
    with pytest.raises(UsageError, match=r"not a \.npz"):
        as_feeds(tmp_path / "missing.npz", [X])

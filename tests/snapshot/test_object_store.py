"""Snapshots in a bucket, behind a service that fails: an acknowledged commit is there, or an error says why not."""

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
from services import direct, s3, s3fs

from hbkit import errors
from hbkit.embedding import SGD, CountAdmission, Table
from hbkit.parquet import fetch
from hbkit.serving import Reader
from hbkit.snapshot import bucket, diff, follow, load, log, prune, save, squash, verify
from hbkit.snapshot.places import place_of

NUMBERS = itertools.count()


def table(name="t", dim=2, **kwargs):
    return Table(name, dim, optimizer=SGD(momentum=0.9), **kwargs)


def train(t, keys, seed=0):
    keys = np.array(list(keys))
    t.lookup(keys, train=True)
    t.update(keys, np.random.default_rng(seed).standard_normal((len(keys), t.dim)))
    return t


def lines(t):
    return [tuple(column.tobytes() for column in chunk) for chunk in t.store.scan()]


def loaded(uri, commit=None, **kwargs):
    t = table(**kwargs)
    return load(uri, [t], commit), t


@pytest.fixture(params=["s3", "s3a", "memory"])
def uri(request):
    """An empty place."""
    name = f"snapshots/{next(NUMBERS)}"
    if request.param == "memory":
        pytest.importorskip("fsspec")
        return f"memory://{name}"
    proxy = request.getfixturevalue("proxy")
    return (s3 if request.param == "s3" else s3fs)(proxy, name)


@pytest.fixture
def place(proxy):
    """The same, in the bucket alone."""
    return s3(proxy, f"snapshots/{next(NUMBERS)}")


def objects(proxy, place):
    """Names of the objects of a place."""
    inner = re.fullmatch(r"s3://(.*)\?.*", place)[1]
    selector = bucket.pafs.FileSelector(inner, recursive=True, allow_not_found=True)
    infos = direct(proxy).get_file_info(selector)
    return sorted(i.path[len(inner) + 1 :] for i in infos if i.type == bucket.pafs.FileType.File)


def test_full_and_delta_commits_come_back(uri):
    t = train(table("größe a%20b", admission=CountAdmission(1)), range(100))
    first = lines(t)
    state = {"dense": bytes(range(256)) * 1000, "empty": b"", "cursor": {"file": 3}}
    assert save(uri, [t], 1, state=state) == "c00000001"
    t.store.erase(np.arange(10))
    train(t, [20, 200], seed=1)
    assert save(uri, [t], 2, base="latest", state={"cursor": None}) == "c00000002"
    assert [(c.id, c.parent, c.step) for c in log(uri)] == [("c00000001", None, 1), ("c00000002", "c00000001", 2)]
    assert verify(uri) == log(uri)
    found, u = loaded(uri, name="größe a%20b", admission=CountAdmission(1))
    assert lines(u) == lines(t) and found.step == 2 and u.step == t.step
    found, u = loaded(uri, "c00000001", name="größe a%20b", admission=CountAdmission(1))
    assert lines(u) == first and found.state == state
    with Reader(uri) as reader:
        assert np.array_equal(reader.lookup(t.name, [20, 5]), t.lookup([20, 5]))
        train(t, [20], seed=2)
        assert not reader.refresh()
        save(uri, [t], 3, base="latest")
        assert reader.refresh() and reader.step == 3
        assert np.array_equal(reader.lookup(t.name, [20]), t.lookup([20]))


def test_nothing_there_is_not_found(uri):
    for read in (log, verify, lambda p: load(p, []), Reader):
        with pytest.raises(errors.NotFound, match="there is no snapshot"):
            read(uri)
    save(uri, [], 1)
    with pytest.raises(errors.NotFound, match="no commit 'c00000007'"):
        load(uri, [], "c00000007")


def test_large_file_goes_up_in_parts(place, proxy, monkeypatch):
    monkeypatch.setattr(bucket, "PART", 5 << 20)  # the least that S3 takes
    t = table(dim=64)
    train(t, range(40_000))
    save(place, [t], 1)
    assert sum("partNumber=" in path for _, path, _, _ in proxy.log) > 3
    verify(place)
    assert lines(loaded(place, dim=64)[1]) == lines(t)


def test_local_uri_is_a_directory(tmp_path):
    t = train(table(), [1])
    save(f"file://{tmp_path}/a", [t], 1)
    assert lines(loaded(tmp_path / "a")[1]) == lines(t)


def each_request(proxy, fault, onwards, act):
    """Let the n-th request of `act(n)` fail, and with `onwards` all after it, for n = 0, 1, ... until none is met."""
    for n in range(100):
        proxy.reset()
        proxy.fault = lambda i, method, n=n: fault if i == n or (onwards and i > n) else None
        act(n)
        met = any(f for *_, f in proxy.log)
        proxy.reset()
        yield n, met
        if not met:
            return
    raise AssertionError("the requests have no end")


@pytest.mark.parametrize(
    "fault", ["503", "lost", *(pytest.param(f, marks=pytest.mark.slow) for f in ("reset", "short", "cut", "stall"))]
)
def test_each_failing_request_is_repeated(place, proxy, hasty, fault):
    """Whichever request of saving and loading fails, once: nobody notices."""
    t = train(table(), [1])
    save(place, [t], 1)
    train(t, [2])
    commits = []
    for n, _ in each_request(
        proxy, fault, False, lambda n: commits.append(save(place, [t], 2, base="c00000001", state={"b": b"x"}))
    ):
        assert commits[-1] == f"c{n + 2:08d}"
    assert n > 4
    verify(place)
    assert lines(loaded(place)[1]) == lines(t)
    assert {path[:9] for path in objects(proxy, place)} == {c.id for c in log(place)}
    found = []
    for _ in each_request(proxy, fault, False, lambda n: found.append(lines(loaded(place)[1]))):
        assert found[-1] == lines(t)
    assert len(found) > 4


@pytest.mark.parametrize("fault", ["503", "403", "reset", "lost"])
def test_service_that_fails_for_good_is_a_named_error(place, proxy, monkeypatch, fault):
    """From any request on: what was committed is there; what was not reported as such is there whole, or not at all."""
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    t = train(table(), [1])
    save(place, [t], 0)
    steps, in_doubt = {0}, 0

    def act(n):
        train(t, [2, 3], seed=n)
        try:
            save(place, [t], n + 1, state={"b": b"x"})
            steps.add(n + 1)
        except errors.StorageError as e:
            assert e.remedy and e.place["file"].startswith("s3://bucket/snapshots") and "\n" not in str(e)

    for n, met in each_request(proxy, fault, True, act):
        found, u = loaded(place)
        if n + 1 not in steps and found.step == n + 1:  # the manifest was put, but no answer came, then or later
            in_doubt += 1
            steps.add(n + 1)
        assert {c.step for c in log(place)} == steps and (n + 1 in steps or met)
        if found.step == n + 1:
            assert lines(u) == lines(t)
    verify(place)
    assert n > 3 and in_doubt == (fault == "lost")


def test_answers_to_the_manifest_that_are_all_lost(place, proxy):
    t = train(table(), [1])
    proxy.fault = lambda i, method: "lost" if method == "PUT" and ".json" in proxy.path else None
    assert save(place, [t], 1) == "c00000001"
    assert sum(fault == "lost" for *_, fault in proxy.log) == fetch.ATTEMPTS  # those after the first find it there
    assert [c.step for c in verify(place)] == [1]


class Overtaken:
    """A store that lets another writer commit while it is scanned."""

    def __init__(self, store, act):
        self.store, self.act = store, act

    def __getattr__(self, name):
        return getattr(self.store, name)

    def point(self, *args, **kwargs):
        self.act()
        return self.store.point(*args, **kwargs)


def test_writer_that_loses_the_race_is_told_so(place, proxy):
    t, other = train(table(), [1]), train(table(), [2])
    t.store = Overtaken(t.store, lambda: save(place, [other], 7))
    with pytest.raises(errors.Locked, match=r"another writer has committed c00000001 meanwhile.*save again"):
        save(place, [t], 1)
    assert [c.step for c in verify(place)] == [7]
    assert len({path.partition("/")[0] for path in objects(proxy, place)}) == 2  # the loser has cleaned up
    t.store = t.store.store
    assert save(place, [t], 2) == "c00000002"


def test_what_dead_writers_left_is_removed_when_it_is_old(place, proxy, monkeypatch):
    t = train(table(), [1])
    save(place, [t], 1)
    p = place_of(place)
    with pytest.raises(KeyboardInterrupt), p.draft() as draft:
        with draft.create(f"{draft.directory}/state/a") as sink:
            sink.write(b"x")
        monkeypatch.setattr(draft, "clean", lambda: None)  # as if it were killed
        raise KeyboardInterrupt
    kept = {c: m["directory"] for c, m in manifests(p).items()}
    assert len({path.partition("/")[0] for path in objects(proxy, place)}) == 3
    assert p.leftovers(kept) == []
    save(place, [t], 2)
    kept = {c: m["directory"] for c, m in manifests(p).items()}
    monkeypatch.setattr(bucket, "AGE", -10.0)
    assert p.leftovers(kept) == [draft.directory]
    assert p.leftovers({"c00000001": kept["c00000001"]}) == []  # another commit has been made meanwhile
    p.remove([draft.directory])
    assert len({path.partition("/")[0] for path in objects(proxy, place)}) == 4
    verify(place)


def manifests(p):
    import json

    return {c: json.loads(p.manifest(c))["manifest"] for c in p.commits()}


def test_removed_commits_are_gone(uri):
    t = train(table(), [1])
    for step in 1, 2:
        save(uri, [t], step)
    p = place_of(uri)
    directory = manifests(p)["c00000001"]["directory"]
    p.remove(["c00000001.json"])
    p.remove([directory, "c00000001.json"])
    assert [c.id for c in verify(uri)] == ["c00000002"]
    with pytest.raises(errors.NotFound, match="no commit 'c00000001'"):
        load(uri, [], "c00000001")


@pytest.mark.parametrize("change", ["short", "gone", "flipped"])
def test_damaged_object_is_corrupt(uri, change):
    t = train(table(), range(50))
    save(uri, [t], 1)
    p = place_of(uri)
    entry = manifests(p)["c00000001"]["tables"]["t"]["rows"][0]
    data = bytearray(p.read(entry["path"], 1 << 20))
    if change == "gone":
        p._service().delete(entry["path"])
    else:
        data[len(data) // 2] ^= 1
        output = p._service().open(entry["path"])
        output.write(data[: -1 if change == "short" else None])
        output.sync()
        output.close()
    for read in (verify, lambda u: load(u, [t])):
        with pytest.raises(errors.Corrupt, match=r"rows-00000\.parquet"):
            read(uri)


def test_missing_bucket_is_a_named_error(proxy):
    with pytest.raises((errors.StorageError, errors.NotFound), match="nobucket"):
        save(s3(proxy, "x").replace("bucket", "nobucket"), [], 1)


def test_saving_without_obstore_says_what_to_install(place):
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "from hbkit import errors\n"
        "from hbkit.snapshot import log, save\n"
        "try:\n"
        f"    save({place!r}, [], 2)\n"
        "except errors.Unsupported as e:\n"
        "    print(e)\n"
        f"print(len(log({place!r})))\n"
    )
    save(place, [], 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'hbkit[s3]'" in done.stdout and done.stdout.endswith("1\n")


def test_a_follower_and_a_reader_take_deltas_from_a_place(uri):
    t, mine = train(table(), range(9)), table()
    follower = follow(uri, [mine])
    assert follower.poll() is None
    save(uri, [t], 0)
    reader = Reader(uri)
    for step in range(1, 4):
        commit = save(uri, [train(t, [step, 20 + step], step)], step, base="latest")
        assert follower.poll().commit == commit and lines(mine) == lines(t)
        assert reader.refresh() and np.array_equal(reader.lookup("t", range(30)), t.lookup(range(30)))


def test_diff_squash_and_prune(uri):
    t = train(table(), range(30))
    save(uri, [t], 1)
    t.store.erase(np.arange(3))
    save(uri, [train(t, [40], seed=1)], 2, base="latest")
    found = diff(uri, "c00000001", "c00000002")["t"]
    assert (found.added.tolist(), found.changed.tolist(), found.erased.tolist()) == ([40], [], [0, 1, 2])
    assert squash(uri) == "c00000003"
    assert save(uri, [train(t, [41], seed=2)], 3, base="latest") == "c00000004"
    assert log(uri)[-1].parent == "c00000003"
    assert prune(uri, keep=2) == ["c00000001", "c00000002"]
    assert [c.id for c in verify(uri)] == ["c00000003", "c00000004"]
    assert lines(loaded(uri)[1]) == lines(t)


def test_background_save_and_what_it_fails_at(place, proxy, monkeypatch):
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    t = train(table(), range(500))
    before = lines(t)
    saving = save(place, [t], 1, background=True)
    train(t, range(500), seed=1)
    assert saving.wait() == "c00000001"
    assert lines(loaded(place)[1]) == before
    proxy.fault = lambda i, method: "503" if method == "PUT" else None
    saving = save(place, [t], 2, base="latest", background=True)
    with pytest.raises(errors.StorageError, match="last cause"):
        saving.wait()
    proxy.reset()
    assert save(place, [t], 3, base="latest") == "c00000002"
    assert lines(loaded(place)[1]) == lines(t)


@pytest.mark.slow
def test_train_and_evaluate_from_the_command_line(place, tmp_path):
    pytest.importorskip("torch")

    def hbkit(*args):
        done = subprocess.run([sys.executable, "-m", "hbkit.cli", *map(str, args)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return re.findall(r"AUC\W+([\d.]+)", done.stdout)

    hbkit("synth", tmp_path / "clicks.parquet", "--rows", 3000, "--shape", "criteo")
    data = ["--data", tmp_path / "clicks.parquet"]
    [auc] = hbkit("train", *data, "--eval-data", data[1], "--label", "label", "--backend", "torch", "--save", place)
    assert hbkit("evaluate", place, *data) == [auc]
    assert len(verify(place)) == 1

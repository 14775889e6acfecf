"""`hbkit train` and `hbkit evaluate` as a user runs them: whole processes, each framework in its own."""

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed"),
    )
    for name in ("torch", "tensorflow")
]


def hbkit(*args, status=0):
    """Run a command; its output. What goes wrong must be one line."""
    done = subprocess.run(
        [sys.executable, "-m", "hbkit.cli", *map(str, args)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == status, done.stdout + done.stderr
    if status:
        assert "Traceback" not in done.stderr
        (line,) = [x for x in done.stderr.splitlines() if x.startswith("hbkit: error:")]
        return line
    return done.stdout


def figure(output, name):
    return re.search(rf"{name}\W+([\d.]+)", output).group(1)


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    """Training and evaluation files of one planted model: different rows of one data set."""
    out = tmp_path_factory.mktemp("clicks")
    hbkit("synth", out / "all", "--rows", 40_000, "--files", 4, "--seed", 1, "--shape", "criteo")
    for i, part in enumerate(sorted((out / "all").glob("*.parquet"))):
        to = out / ("test" if i == 3 else "train")
        to.mkdir(exist_ok=True)
        part.rename(to / part.name)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_train_saves_what_evaluates_to_the_same_figures(clicks, tmp_path, backend):
    common = ["--label", "label", "--batch-size", 1000, "--backend", backend]
    out = hbkit("train", "--data", clicks / "train", "--eval-data", clicks / "test", "--save", tmp_path / "m", *common)
    auc, log_loss = figure(out, "AUC"), figure(out, "log loss")
    assert 0.55 < float(auc) <= 1 and f"hbkit evaluate {tmp_path / 'm'}" in out
    again = hbkit("evaluate", tmp_path / "m", "--data", clicks / "test")
    assert (figure(again, "AUC"), figure(again, "log loss")) == (auc, log_loss)
    assert re.findall(r"keys in .*", again) == re.findall(r"keys in .*", out)


def test_train_is_a_function_of_its_seed_and_the_config_file_holds_the_same_names(clicks, tmp_path):
    pytest.importorskip("torch")
    names = ["--label", "label", "--dense", "i1,i2", "--sparse", "c1,c2,c3", "--dim", 4, "--lr", 0.1]
    data = ["--data", clicks / "test", "--eval-data", clicks / "test"]
    first = hbkit("train", *data, *names, "--seed", 3)
    assert figure(hbkit("train", *data, *names, "--seed", 3), "AUC") == figure(first, "AUC")
    assert figure(hbkit("train", *data, *names, "--seed", 4), "AUC") != figure(first, "AUC")
    config = tmp_path / "c.toml"
    config.write_text('label = "label"\ndense = ["i1", "i2"]\nsparse = "c1,c2,c3"\ndim = 4\nlr = 0.1\nseed = 9\n')
    assert figure(hbkit("train", *data, "--config", config, "--seed", 3), "AUC") == figure(first, "AUC")
    config.write_text("labels = 1\n")
    assert "unknown name 'labels'" in hbkit("train", *data, "--config", config, status=2)


def test_train_refuses_bad_input_in_one_line(clicks, tmp_path):
    part = next((clicks / "test").glob("*.parquet"))
    half = tmp_path / "half.parquet"
    half.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    empty = tmp_path / "empty"
    empty.mkdir()
    nulls = tmp_path / "nulls.parquet"
    pq.write_table(pa.table({"label": [1.0, None, 0.0], "k": [1, 2, 3]}), nulls)
    fives = tmp_path / "fives.parquet"
    pq.write_table(pa.table({"label": [1.0, 5.0, 0.0], "k": [1, 2, 3]}), fives)
    for data, label, words in [
        (tmp_path / "nothing.parquet", "label", ["nothing.parquet"]),
        (empty, "label", ["empty", ".parquet"]),
        (part, "clicked", ["no column 'clicked'", "label"]),
        (nulls, "label", ["nulls.parquet", "column label", "null"]),
        (fives, "label", ["fives.parquet", "label 5"]),
        (half, "label", ["half.parquet"]),
    ]:
        line = hbkit("train", "--data", data, "--label", label, status=2)
        for word in words:
            assert word in line
    assert "put a glob in quotes" in hbkit("train", "--data", part, half, "--label", "label", status=2)
    line = hbkit("train", "--data", part, "--label", "label", "--save", fives, status=2)
    assert "cannot save there" in line and "fives.parquet" in line
    assert "bad.parquet" in hbkit("evaluate", tmp_path / "bad.parquet", "--data", part, status=2)


def test_train_that_diverges_fails(clicks):
    pytest.importorskip("torch")
    line = hbkit("train", "--data", clicks / "test", "--label", "label", "--dense-lr", 1e30, "--epochs", 3, status=2)
    assert "training diverged" in line and "lower" in line


def test_train_without_its_framework_names_the_extra(clicks):
    code = (
        "import sys; sys.modules['torch'] = None\nfrom hbkit.cli.main import main\n"
        f"main(['train', '--data', {str(clicks / 'test')!r}, '--label', 'label'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'hbkit[torch]'" in done.stderr and "Traceback" not in done.stderr


def test_train_handles_missing_keys_strings_and_lists(tmp_path):
    pytest.importorskip("torch")
    rng, n = np.random.default_rng(0), 4000
    user = rng.integers(0, 50, n)
    table = pa.table(
        {
            "y": (rng.random(n) < user / 50).astype(np.int8),
            "user": pa.array(user, mask=rng.random(n) < 0.1),
            "city": pa.array([None if u % 7 == 0 else f"city-{u % 9}" for u in user.tolist()]),
            "seen": pa.array([None if u % 5 == 0 else list(range(u % 4)) for u in user.tolist()]),
            "tags": pa.array([[f"t{u % 3}"] * (u % 3) for u in user.tolist()]),
            "price": pa.array(rng.random(n), mask=rng.random(n) < 0.2),
            "big": rng.integers(2**63, 2**64 - 1, n, dtype=np.uint64),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=500)
    out = hbkit(
        "train", "--data", tmp_path / "t.parquet", "--eval-data", tmp_path / "t.parquet", "--label", "y", "--epochs", 2,
        "--batch-size", 256, "--save", tmp_path / "m",
    )  # fmt: skip
    assert float(figure(out, "AUC")) > 0.7 and "seen:ragged" in out
    again = hbkit("evaluate", tmp_path / "m", "--data", tmp_path / "t.parquet")
    assert figure(again, "AUC") == figure(out, "AUC")


@pytest.fixture(scope="module")
def past(tmp_path_factory):
    """Users, items, what they saw before, and two labels."""
    rng, n, path = np.random.default_rng(0), 2000, tmp_path_factory.mktemp("past") / "past.parquet"
    user, item = rng.integers(0, 50, (2, n))
    logit = rng.normal(0, 1.5, 50)[user] + rng.normal(0, 1.5, 50)[item]
    columns = {
        "click": (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(np.int8),
        "buy": (rng.random(n) < 1 / (1 + np.exp(logit))).astype(np.int8),
        "user": user,
        "item": item,
        "seen": [rng.integers(0, 50, k).tolist() for k in rng.integers(0, 6, n)],
        "price": rng.random(n),
    }
    pq.write_table(pa.table(columns), path, row_group_size=1000)
    return path


def trained(past, runs, *args):
    """Output of several trainings in one process, each of which must succeed."""
    common = ["train", "--data", str(past), "--eval-data", str(past), "--batch-size", "256", *args]
    code = f"from hbkit.cli.main import main\nfor run in {runs!r}:\n    main({common!r} + run, standalone_mode=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("trained\n")[1:]


OPTIONS = {
    "mmoe": ["--label", "click,buy", "--positive-weight", "1,2"],
    "din": ["--label", "click", "--sequence", "seen:item", "--sequence-length", "3"],
}


def run_of(name, *args):
    return ["--model", name, *OPTIONS.get(name, ["--label", "click"]), *args]


@pytest.mark.parametrize("backend", BACKENDS)
def test_train_takes_every_model(past, tmp_path, backend):
    from hbkit.cli.train import MODELS

    extra = {"dlrm": ["--compile"], "deepfm": ["--amp"], "din": ["--save", str(tmp_path / "din"), "--amp"]}
    extra["mmoe"] = ["--save", str(tmp_path / "mmoe")]
    runs = [run_of(name, *extra.get(name, [])) for name in MODELS]
    outputs = trained(past, runs, "--backend", backend, "--group", "user")
    for name, out in zip(MODELS, outputs, strict=True):
        assert f"{name} ({backend})" in out
        assert all(float(x) > 0.75 for x in re.findall(r" AUC +([\d.]+)", out))
        assert len(re.findall(r"GAUC +[\d.]+", out)) == len(re.findall(r" log loss", out)) == 1 + (name == "mmoe")
    for name, figures in (("mmoe", ["click: AUC", "buy: AUC", "buy: GAUC"]), ("din", ["GAUC", "log loss"])):
        again = hbkit("evaluate", tmp_path / name, "--data", past)
        # What was trained in bfloat16 is evaluated in float32.
        (out,) = [out for model, out in zip(MODELS, outputs, strict=True) if model == name]
        for figure_name in figures:
            assert float(figure(again, figure_name)) == pytest.approx(float(figure(out, figure_name)), abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_train_compiles_and_mixes_precisions_of_every_model(past, backend):
    from hbkit.cli.train import MODELS

    ways = [[], ["--compile"], ["--amp"], ["--compile", "--amp"]]
    for name in MODELS:
        outputs = trained(past, [run_of(name, *way) for way in ways], "--backend", backend)
        figures = [float(figure(out, "AUC")) for out in outputs]
        assert figures[0] > 0.75 and figures == pytest.approx([figures[0]] * len(ways), abs=0.02), name


def test_train_keeps_the_newest_of_a_sequence(past, tmp_path):
    pytest.importorskip("torch")
    table, short = pq.read_table(past), tmp_path / "short.parquet"
    seen = pa.array([x[-2:] for x in table["seen"].to_pylist()], pa.list_(pa.int64()))
    pq.write_table(table.set_column(table.column_names.index("seen"), "seen", seen), short, row_group_size=1000)
    din = ["--model", "din", "--label", "click", "--sequence", "seen:item"]
    save = ["--save", str(tmp_path / "m")]
    whole, cut = trained(past, [din, [*din, "--sequence-length", "2", *save]])
    (other,) = trained(short, [din])
    assert figure(cut, "AUC") == figure(other, "AUC") != figure(whole, "AUC")
    assert figure(hbkit("evaluate", tmp_path / "m", "--data", past), "AUC") == figure(cut, "AUC")


def test_train_weighs_stops_and_logs(past, tmp_path):
    pytest.importorskip("torch")
    common = ["--label", "click", "--epochs", "12", "--lr", "0.5"]
    logs, saved, noise = tmp_path / "logs", tmp_path / "m", tmp_path / "noise.parquet"
    table = pq.read_table(past)
    shuffled = pa.array(np.random.default_rng(1).permutation(table["click"].to_numpy()))
    pq.write_table(table.set_column(0, "click", shuffled), noise)
    patient = ["--patience", "1", "--log-dir", str(logs), "--save", str(saved), "--eval-data", str(noise)]
    click, heavy = ["--label", "click"], ["--positive-weight", "20"]
    both = ["--label", "click,buy", "--model", "mmoe"]
    runs = [[*common, *patient], click, [*click, *heavy], both, [*both, "--positive-weight", "1,20"]]
    one, light, heavy, even, odd = trained(past, runs)
    log = next(logs.iterdir()).read_bytes()
    n_epochs = log.count(b"evaluation/auc")
    assert 1 < n_epochs < 12 and log.count(b"training/loss") == 8 * n_epochs
    assert re.search(rf"best epoch +{n_epochs - 1},", one)
    again = hbkit("evaluate", saved, "--data", noise)
    assert figure(again, "AUC") == figure(one, "AUC")  # the best epoch is what was saved
    assert float(figure(heavy, "log loss")) > 0.6 > float(figure(light, "log loss"))
    assert float(figure(odd, "buy: log loss")) > 0.8 > float(figure(even, "buy: log loss"))
    assert float(figure(odd, "click: log loss")) < 0.8
    for wrong, says in [
        (["--patience", 1], "give --eval-data"),
        (["--group", "user"], "give --eval-data"),
        (["--model", "din"], "din needs a sequence"),
        (["--sequence", "seen:item"], "deepfm takes no sequence"),
        (["--label", "click,buy"], "deepfm predicts one label"),
        (["--group", "seen", "--eval-data", past], "'seen' is no column of one key"),
        (["--label", "click,buy", "--model", "mmoe", "--positive-weight", "2,3,4"], "2,3,4 of 2 labels"),
        (["--positive-weight", "much"], "give numbers"),
    ]:
        assert says in hbkit("train", "--data", past, "--label", "click", *wrong, status=2)


@pytest.mark.parametrize("model", ["dlrm", "deepfm"])
def test_train_beats_the_floor_on_movielens(shared, tmp_path, model):
    pytest.importorskip("torch")
    hbkit("convert", shared("data/ml-1m"), tmp_path / "d", "--format", "movielens", "--split", "8:1:1")
    out = hbkit(
        "train", "--data", tmp_path / "d/train.parquet", "--eval-data", tmp_path / "d/test.parquet", "--label", "label",
        "--model", model, "--batch-size", 1024,
    )  # fmt: skip
    assert float(figure(out, "AUC")) > 0.863


@pytest.mark.parametrize("model", ["dlrm", "deepfm"])
def test_train_beats_the_floor_on_criteo(shared, tmp_path, model):
    pytest.importorskip("torch")
    hbkit(
        "convert", shared("data/criteo-80k/clicks.parquet"), tmp_path / "d", "--split", "75:25", "--split-by", "order",
    )  # fmt: skip
    out = hbkit(
        "train", "--data", tmp_path / "d/train.parquet", "--eval-data", tmp_path / "d/test.parquet", "--label", "label",
        "--model", model, "--batch-size", 1024, "--lr", 0.02,
    )  # fmt: skip
    assert float(figure(out, "AUC")) > 0.679

"""The event files of `hbkit train --log-dir`, read by TensorFlow."""

import pytest
import tensorflow as tf

from hbkit import errors
from hbkit.cli.events import EventWriter


def test_tensorflow_reads_the_scalars(tmp_path):
    with EventWriter(str(tmp_path / "new" / "logs")) as log:
        for step in (0, 1, 300):
            log.scalars(step, {"training/loss": step + 0.25, "évaluation/auc": -1.0})
    (path,) = (tmp_path / "new" / "logs").iterdir()
    events = [e for e in tf.compat.v1.train.summary_iterator(str(path)) if e.summary.value]
    assert [e.step for e in events] == [0, 1, 300]
    found = [{v.tag: v.simple_value for v in e.summary.value} for e in events]
    assert found == [{"training/loss": step + 0.25, "évaluation/auc": -1.0} for step in (0, 1, 300)]


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with EventWriter(None) as log:
        log.scalars(0, {"a": 1.0})
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(errors.StorageError, match="log-dir"):
        EventWriter(str(tmp_path / "file"))

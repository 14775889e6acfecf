"""The event files of `hbkit train --log-dir`, read by TensorFlow."""

import pytest
import tensorflow as tf

from hbkit import errors
from hbkit.cli.events import EventWriter


def test_tensorflow_reads_the_scalars(tmp_path):
    values = {step: {"training/loss": step + 0.25, "évaluation/auc": -1.0} for step in (0, 1, 300)}
    with EventWriter(str(tmp_path / "new" / "logs")) as log:
        for step, scalars in values.items():
            log.scalars(step, scalars)
    (path,) = (tmp_path / "new" / "logs").iterdir()
    events = tf.compat.v1.train.summary_iterator(str(path))
    found = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert found == [(step, tag, value) for step, scalars in values.items() for tag, value in scalars.items()]


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with EventWriter(None) as log:
        log.scalars(0, {"a": 1.0})
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(errors.StorageError, match="log-dir"):
        EventWriter(str(tmp_path / "file"))

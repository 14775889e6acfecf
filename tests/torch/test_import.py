"""A dense weight becomes rows of a table, and rows a dense weight."""

import numpy as np
import torch

import hbkit
from hbkit.snapshot import export_dense, import_arrays


def test_a_dense_weight_is_imported_and_exported():
    embedding = torch.nn.Embedding(6, 4)
    weight = embedding.weight
    t = hbkit.embedding.Table("t", 4)
    assert import_arrays(t, None, weight) == 6
    np.testing.assert_array_equal(t.lookup(np.arange(6)), weight.detach().numpy())
    weights, vocabulary = export_dense(t)
    assert vocabulary.tolist() == list(range(6))
    np.testing.assert_array_equal(
        torch.nn.Embedding.from_pretrained(torch.tensor(weights)).weight, weight.detach().numpy()
    )
    import_arrays(t, torch.tensor([5, 3]), weight[:2])
    np.testing.assert_array_equal(t.lookup([5, 3]), weight.detach().numpy()[:2])

"""tests/kernels/test_gpu.py itself, interpreted and small, so that its own mistakes show without a GPU."""

import pytest
import test_gpu
import torch
from conftest import tiny_config
from span_cases import documents
from test_gpu import full_precision_products  # noqa: F401  (a fixture of all GPU tests)

import kernels


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "choice", "triton")
    monkeypatch.setattr(test_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(test_gpu, "REPEATS", 1)
    monkeypatch.setattr(test_gpu, "BEYOND", 2**14)
    monkeypatch.setattr(test_gpu, "HEADS", 2)
    monkeypatch.setattr(test_gpu, "VOCABULARY", 500)


def test_every_comparison_runs(monkeypatch):
    dtype = torch.float16
    test_gpu.test_attention_with_every_mask("gaps", dtype)
    monkeypatch.setitem(test_gpu.LONG, "packed", documents(9, 1, 7))
    test_gpu.test_attention_over_many_tiles("packed", 72, dtype)
    test_gpu.test_cross_entropy(17, 33, 500, dtype)
    test_gpu.test_norms(17, 129, dtype)
    test_gpu.test_rope(7, 5, 5, 32, dtype)
    test_gpu.test_swiglu(9, 129, dtype)
    test_gpu.test_nf4((97, 130), dtype)


@pytest.mark.parametrize("name", test_gpu.NAMES)
def test_changed_bits_are_found(name, monkeypatch):
    small = test_gpu.everything(torch.float16, N=15, V=70)
    monkeypatch.setattr(test_gpu, "everything", lambda: small)
    test_gpu.test_the_same_bits_every_time(name)
    count = iter(range(9))
    monkeypatch.setitem(small, name, lambda: [torch.tensor(next(count))])
    with pytest.raises(AssertionError, match="run 2 differs"):
        test_gpu.test_the_same_bits_every_time(name)


def test_the_largest_tests_run(monkeypatch):
    test_gpu.test_attention_beyond_31_bits(None)
    test_gpu.test_cross_entropy_beyond_31_bits(None)
    test_gpu.test_elementwise_beyond_31_bits(None)


def test_the_model_tests_run(monkeypatch):
    monkeypatch.setattr(test_gpu, "tiny_config", lambda **text: tiny_config(num_hidden_layers=1, **text))
    test_gpu.test_a_batch_without_images_or_labels()
    test_gpu.test_a_whole_model_equals_plain_torch(torch.float32, monkeypatch)


def test_an_error_above_the_budget_fails():
    """2 % in one element of 6,400"""
    x, w = test_gpu.data(100, 64, dtype=torch.float32), test_gpu.data(64, dtype=torch.float32)
    test_gpu.check(lambda x, w: x * w, lambda x, w: x * w, x, w)
    wrong = torch.ones(100, 64)
    wrong[3, 5] = 1.02
    with pytest.raises(AssertionError, match="above the budget"):
        test_gpu.check(lambda x, w: x * w * wrong, lambda x, w: x * w, x, w)

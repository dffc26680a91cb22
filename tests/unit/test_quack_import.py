"""`torch.compile` while QuACK is imported: later, but the same."""

from __future__ import annotations

import pytest
import torch

from moe_layer.experts.quack_plans import compile_later


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.fixture
def calls(monkeypatch):
    """What reaches `torch.compile`, which here returns its argument."""
    found: list[tuple[object, dict]] = []

    def compile_now(model=None, **options):
        found.append((model, options))
        return model

    monkeypatch.setattr(torch, "compile", compile_now)
    return found


@pytest.mark.parametrize("as_decorator", [False, True])
def test_a_function_is_compiled_once_at_its_first_call(calls, as_decorator):
    with compile_later():
        later = torch.compile(dynamic=True)(double) if as_decorator else torch.compile(double, dynamic=True)
    assert calls == [] and later.__name__ == "double"
    assert later(torch.tensor(3.0)) == 6.0 and later(torch.tensor(4.0)) == 8.0
    assert calls == [(double, {"dynamic": True})]


def test_a_module_is_compiled_at_once(calls):
    module = torch.nn.Linear(2, 2)
    with compile_later():
        assert torch.compile(module) is module
    assert calls == [(module, {})]


def test_it_ends_with_the_import_also_when_that_fails():
    compile_now = torch.compile
    with pytest.raises(ImportError), compile_later():
        assert torch.compile is not compile_now
        raise ImportError("no such library")
    assert torch.compile is compile_now

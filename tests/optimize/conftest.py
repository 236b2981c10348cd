import pytest

from fastseg import _C


@pytest.fixture
def fast_products(monkeypatch):
    """As on processors that multiply bfloat16 fast."""
    before = _C.bf16_products()
    monkeypatch.setattr(_C, "cpu_isa", lambda: "avx512_bf16")
    _C.set_bf16_products(True)
    yield
    _C.set_bf16_products(before)

"""Functional operators: one file per op with its checks, reference, fake kernel and gradient."""

__all__: list[str] = []

"""Drop-in layers over fastseg.ops."""

__all__: list[str] = []

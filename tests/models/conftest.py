import pytest


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The networks here are too small to share among threads."""
    threads(1)

import pytest


@pytest.fixture
def native():
    from prime_kernels import _native

    if _native.unavailable_reason() is not None:
        pytest.skip(_native.unavailable_reason())
    return _native


@pytest.fixture
def passes(native):
    from prime_kernels._native import packed

    return packed.CPU


@pytest.fixture
def rows(native):
    from prime_kernels._native import rows

    return rows

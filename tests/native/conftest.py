import pytest


@pytest.fixture
def native():
    from prime_kernels import _native

    if _native.unavailable_reason() is not None:
        pytest.skip(_native.unavailable_reason())
    return _native

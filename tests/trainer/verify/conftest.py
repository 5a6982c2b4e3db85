"""The sandboxes that work here."""

import pytest
from helpers.programs import PACKAGES

from prime_trainer.verify import sandbox as sandbox_module
from prime_trainer.verify.sandbox import Confinement, obstacle


@pytest.fixture(scope="module", params=sandbox_module.KINDS)
def sandbox(request):
    reason = obstacle(request.param, PACKAGES)
    if reason is not None:
        pytest.skip(reason)
    return Confinement(request.param, PACKAGES)

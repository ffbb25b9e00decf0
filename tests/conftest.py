"""The CPU kernels, where they are built."""

import pytest

from service.engine.cpu import library


@pytest.fixture(scope="session")
def kernels():
    found = library.kernels()
    if found is None:
        pytest.skip("the kernels are not built: there was no C++ compiler")
    return found


@pytest.fixture(params=library.ISAS)
def isa(request, kernels):
    """The kernels on each instruction set that this machine has, with two threads."""
    wanted = library.ISAS.index(request.param)
    used = library.ISAS[kernels.init(wanted, 2, library.gomp_parallel())]
    yield request.param if used == request.param else pytest.skip(f"this machine has no {request.param}")
    kernels.init(-1, 2, library.gomp_parallel())

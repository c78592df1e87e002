"""What the tests share: one small store for the whole session, and recipes that train in a second."""

import pytest

from lthlib.core.store import Store
from lthlib.training.recipe import Recipe

TINY = Recipe(epochs=2, batch_size=50, warmup=0.0, precision="float32")


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def tiny():
    """Fields of a ticket that trains in a second or two."""
    return {"data": "mnist5k", "arch": "resnet8", "recipe": TINY, "train_size": 500}

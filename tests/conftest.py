from __future__ import annotations

import os

# Before torch is imported, here and in every subprocess: the tests are many and small, and run in
# several processes at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator

import hypothesis
import pytest

# The project's own plugin, also where the installed package does not name it yet.
pytest_plugins = ["gradscope.pytest_plugin"]

# No timed assertions, and the same examples in every run: nothing fails by chance. To look for others,
# pytest --hypothesis-profile random.
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.register_profile("gate", deadline=None, derandomize=True, database=None)
# Where a test is meant to fail, the smallest example does not matter.
hypothesis.settings.register_profile(
    "mutations",
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("gate")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (minutes each)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that start pytest or the command line read what it prints: a CI server's variables, or a
    user's habits of colour and width, change that."""
    for name in (
        "CI",
        "BUILD_NUMBER",
        "COLUMNS",
        "FORCE_COLOR",
        "NO_COLOR",
        "PY_COLORS",
        "PYTEST_ADDOPTS",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module", params=["one pass", "torch"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Statistics by the optional extension modules, and without them."""
    from gradscope.statistics import one_pass

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(one_pass, "_native", None)
        elif not one_pass.available():
            pytest.skip("the extension module was not built")
        yield

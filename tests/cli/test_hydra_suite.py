"""Hydra's own tests of launchers, for ours: jobs whose task is not qpipe's."""

from __future__ import annotations

import pytest
from hydra import version
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, LauncherTestSuite

from qpipe.cli.main import _register

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def registered(hydra_restore_singletons: None) -> None:
    """Our plug-ins, in a Hydra of the version that its tests were written for; the version is a singleton, too."""
    version.setbase("1.1")
    _register()


@pytest.mark.parametrize(("launcher_name", "overrides"), [("qpipe", [])])
class TestLauncher(LauncherTestSuite):  # type: ignore[misc]  # hydra ships no types that mypy reads here
    """A job, several, other resolvers, what is mandatory."""


@pytest.mark.parametrize(("launcher_name", "overrides"), [("qpipe", ["hydra.sweeper.max_batch_size=2"])])
class TestBatches(BatchedSweeperTestSuite):  # type: ignore[misc]
    """Jobs in batches."""

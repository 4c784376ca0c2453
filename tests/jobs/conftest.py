"""What tests of jobs share."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def need() -> Callable[[str], None]:
    """Skip where a program is missing; with CI=true, where nothing may be missing, fail."""

    def check(program: str) -> None:
        if shutil.which(program) is None:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
                f"{program} is not installed: scripts/system-tools"
            )

    return check

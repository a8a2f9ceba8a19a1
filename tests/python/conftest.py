import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[2]

# For the processes that tests start.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")]))

# Runs that differ from one machine to the next hide faults; a first call also compiles and loads.
settings.register_profile("remnant", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("remnant")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(20231)


@pytest.fixture(scope="session")
def data_directory():
    """The directory of real data sets; tests that need it are skipped without it."""
    path = Path(os.environ.get("REMNANT_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data sets in {path}: set REMNANT_DATA")
    return path


@pytest.fixture(scope="session")
def program():
    """The remnant program of this build."""
    path = Path(os.environ.get("REMNANT_BUILD", ROOT / "build")) / "bin" / "remnant"
    if not path.is_file():
        pytest.skip(f"no program at {path}: run ./dev build")
    return path

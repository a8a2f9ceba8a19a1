"""Finds libremnant.so, refuses it beside a torch it was not built for, and loads its ops."""

import json
import os
from pathlib import Path

import torch

_NAME = "libremnant.so"
_BUILD_INFO = "remnant_build.json"  # written beside the library by CMake


def _find() -> Path:
    """$REMNANT_LIBRARY, else the installed package's own, else the build of this source checkout."""
    named = os.environ.get("REMNANT_LIBRARY")
    if named:
        path = Path(named)
        if not path.is_file():
            raise ImportError(f"REMNANT_LIBRARY names {named}, which is not a file: set it to {_NAME} or unset it")
        return path
    package = Path(__file__).resolve().parent
    candidates = [package / _NAME, package.parents[1] / "build" / "lib" / _NAME]
    for path in candidates:
        if path.is_file():
            return path
    looked = " or ".join(str(path.parent) for path in candidates)
    raise ImportError(f"remnant found no {_NAME} in {looked}: run ./dev build or pip install the package")


def _build_info(path: Path) -> dict:
    try:
        return json.loads((path.resolve().parent / _BUILD_INFO).read_text())
    except OSError:  # a library put elsewhere by hand: only the dynamic linker can object
        return {}
    except ValueError as error:
        raise ImportError(f"{_BUILD_INFO} beside {path} is damaged ({error}): build remnant again") from error


def _check_torch(built: str | None) -> None:
    # The C++ interface has no stable ABI between minor versions: a mismatch may load and then crash.
    running = ".".join(torch.__version__.split(".")[:2])
    if built is not None and built != running:
        raise ImportError(f"remnant was built for PyTorch {built}, but PyTorch {torch.__version__} is running: "
                          "build remnant again in this environment")


def _load() -> tuple[Path, str]:
    path = _find()
    info = _build_info(path)
    _check_torch(info.get("torch"))
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"{path} does not load beside PyTorch {torch.__version__} ({error}): "
                          "build remnant again in this environment") from error
    return path, info.get("version", "unknown")


library_path, version = _load()

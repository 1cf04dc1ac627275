"""Whether a package with kernels that we call is installed here, new enough, and loads."""

from __future__ import annotations

import importlib
import importlib.metadata

from packaging.version import Version


def install_refusal(
    distribution: str, module: str, *, oldest: str, extra: str = "", wheels: str = ""
) -> str | None:
    """Why a package with kernels cannot be used: missing, too old, or built for another torch or CUDA.

    It comes by an `extra` of ours; or, where PyPI has none, by the page of its `wheels`.
    """
    install = f"'bico_ds[{extra}]'" if extra else f"{distribution} --find-links {wheels}"
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"is not installed (pip install {install})"
    if Version(version) < Version(oldest):
        return f"{oldest} or newer is needed, {version} is installed (pip install -U {install})"
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        return f"{version} is installed but does not load ({reason}): build it for this torch and CUDA"
    return None

"""maturin, and a word on Rust where it fails for want of it.

Without a `cargo` on PATH maturin fetches a toolchain into the user's cache. Where that is impossible too, it ends in a
page of connection errors, of which none says what to do.
"""

from __future__ import annotations

import shutil
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any

import maturin

_REMEDY = """
pmdflow: building from source needs Rust (1.85 or newer), which is not on PATH, and fetching it has failed (see above).
Install it (rustup, or your system's packages; behind a proxy set HTTPS_PROXY) and run the same command again,
or install a wheel, which needs no Rust.
"""


def _explained(hook: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(hook)
    def explained(*arguments: Any, **options: Any) -> Any:
        try:
            return hook(*arguments, **options)
        except (Exception, SystemExit) as error:
            if shutil.which("cargo"):
                raise
            traceback.print_exception(error, limit=0)
            sys.exit(_REMEDY)

    return explained


get_requires_for_build_wheel = maturin.get_requires_for_build_wheel
get_requires_for_build_editable = maturin.get_requires_for_build_editable
get_requires_for_build_sdist = maturin.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = _explained(maturin.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _explained(maturin.prepare_metadata_for_build_editable)
build_wheel = _explained(maturin.build_wheel)
build_editable = _explained(maturin.build_editable)
build_sdist = _explained(maturin.build_sdist)

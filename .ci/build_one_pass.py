"""Builds gradscope's one extension module where a C compiler is found; without one it does without.

Called by the build backend (hatchling) for wheels and editable installs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext

NAME = "gradscope.statistics._one_pass"
SOURCE = "gradscope/statistics/_one_pass.c"


class OnePass(BuildHookInterface):
    """Compiles the module beside its source, and takes it along if that went well."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a failure is said, and no failure of the installation."""
        try:
            built = compiled(Path(self.root))
        except Exception as error:  # of any compiler, missing or unable
            print(f"gradscope: {NAME} was not built, slower torch operations do its work: {error}")
            return
        build_data["artifacts"].append(built.relative_to(self.root).as_posix())
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def compiled(root: Path) -> Path:
    """Compile the module beside its source; returns its file."""
    options = ["/O2"] if sys.platform == "win32" else ["-O3", "-g0"]
    extension = Extension(NAME, [SOURCE], extra_compile_args=options)
    command = build_ext(Distribution({"name": "torch-gradscope", "ext_modules": [extension]}))
    command.ensure_finalized()
    with tempfile.TemporaryDirectory() as scratch:
        command.build_temp = command.build_lib = scratch
        command.inplace = False
        command.run()
        (made,) = Path(scratch).rglob("_one_pass*" + Path(command.get_ext_filename(NAME)).suffix)
        target = root / "gradscope" / "statistics" / made.name
        # Another process may have the old one open: a new file, not new contents.
        target.unlink(missing_ok=True)
        target.write_bytes(made.read_bytes())
    return target

"""Builds gradscope's two extension modules where a C compiler is found; without one it does without.

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

SOURCES = {
    "gradscope.statistics._one_pass": "gradscope/statistics/_one_pass.c",
    "gradscope.collect._quick": "gradscope/collect/_quick.c",
}


class Extensions(BuildHookInterface):
    """Compiles the modules beside their sources, and takes them along if that went well."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a failure is said, and no failure of the installation."""
        for name, source in SOURCES.items():
            try:
                built = compiled(Path(self.root), name, source)
            except Exception as error:  # of any compiler, missing or unable
                print(f"gradscope: {name} was not built, slower torch operations do its work: {error}")
                continue
            build_data["artifacts"].append(built.relative_to(self.root).as_posix())
            build_data["pure_python"] = False
            build_data["infer_tag"] = True


def compiled(root: Path, name: str, source: str) -> Path:
    """Compile a module beside its source; returns its file."""
    options = ["/O2"] if sys.platform == "win32" else ["-O3", "-g0"]
    extension = Extension(name, [source], extra_compile_args=options)
    command = build_ext(Distribution({"name": "torch-gradscope", "ext_modules": [extension]}))
    command.ensure_finalized()
    stem = name.rpartition(".")[2]
    with tempfile.TemporaryDirectory() as scratch:
        command.build_temp = command.build_lib = scratch
        command.inplace = False
        command.run()
        (made,) = Path(scratch).rglob(f"{stem}*" + Path(command.get_ext_filename(name)).suffix)
        target = root / Path(source).parent / made.name
        # Another process may have the old one open: a new file, not new contents.
        target.unlink(missing_ok=True)
        target.write_bytes(made.read_bytes())
    return target

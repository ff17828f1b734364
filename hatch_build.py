"""The build hook: compiles the C++ core into the package. Without a compiler the install goes on without it."""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CoreBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """For wheels, editable ones too; an sdist holds the sources only."""
        path = Path(self.root, "src/receptance/native/build.py")
        spec = importlib.util.spec_from_file_location("receptance_native_build", path)
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        try:
            library = build.build()
        except build.BuildError as error:
            self.app.display_warning(
                f"receptance: the CPU engine was not compiled; without torch models run in NumPy, slowly. {error}"
            )
            return
        # the core is a plain shared library that ctypes loads: it fits every Python of this platform
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["pure_python"] = False
        build_data["artifacts"].append(str(Path(library).relative_to(self.root)))

"""A wheel carries what a checkout has at its top level (bico_ds/config/resources.py finds either); git holds no copies."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RESOURCES = ("recipes/*.yaml", "ds_configs/*.json", "launch/slurm/train.sbatch")


class BuildWithResources(build_py):
    """An editable installation takes nothing: its package finds the checkout's own files."""

    def run(self) -> None:
        # What an earlier build left there, and the checkout has no longer, must not come along.
        shutil.rmtree(Path(self.build_lib, "bico_ds"), ignore_errors=True)
        super().run()
        if self.editable_mode:
            return
        for pattern in RESOURCES:
            for file in sorted(Path().glob(pattern)):
                target = Path(self.build_lib, "bico_ds", "resources", file)
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithResources})

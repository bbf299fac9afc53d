"""What pyproject.toml cannot say: model_card.md lies at the root here, and inside the package in a wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithCard(build_py):
    """Copy model_card.md into the package, where the model files look for it once installed."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file("model_card.md", str(Path(self.build_lib, "scaledown")))


setup(cmdclass={"build_py": BuildWithCard})

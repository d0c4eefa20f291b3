"""A virtual environment where a test may install plugins without leaving a trace.

It sees everything that the running interpreter has installed, for torch is too large to install
again; what is installed into it, nobody else sees. Nothing is downloaded.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

# `pip install` as people type it, without the network: nothing that it would fetch is needed.
COMMANDS = {
    "adapter": """exec {python} -c 'from adapterhub_lite.cli import main; main()' "$@" """,
    "pytest": """exec {python} -m pytest "$@" """,
    "pip": """[ "$1" = install ] && shift && set -- install --quiet --no-index --no-deps --no-build-isolation "$@"
exec {python} -m pip --disable-pip-version-check "$@" """,
}
# What building leaves in a source tree.
LEFTOVERS = shutil.ignore_patterns("build", "*.egg-info", ".*", "__pycache__")


def clean_venv(folder: Path) -> dict[str, str]:
    """Make it in `folder`; the environment variables under which commands run in it."""
    venv.create(folder, with_pip=False, symlinks=True)
    bin_folder, packages = (Path(sysconfig.get_path(p, vars=_places(folder))) for p in ("scripts", "purelib"))
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # addsitedir, not a plain path: packages in development are there through .pth files of their own.
    (packages / "outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in sorted(outer)))
    for name, script in COMMANDS.items():
        file = bin_folder / name
        file.write_text("#!/bin/sh\n" + script.format(python=shlex.quote(str(bin_folder / "python"))) + "\n")
        file.chmod(0o755)
    path = os.pathsep.join((str(bin_folder), os.environ.get("PATH", os.defpath)))
    own = {"VIRTUAL_ENV": str(folder), "PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "ADAPTERHUB_LITE_"))}
    return inherited | own


def shell(command: str, folder: Path, env: dict[str, str]) -> tuple[int, str]:
    """The exit code of a command line and all that it printed."""
    out = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(command, shell=True, cwd=folder, env=env, text=True, stdout=out[0], stderr=out[1])
    return done.returncode, done.stdout


def _places(folder: Path) -> dict[str, str]:
    return {"base": str(folder), "platbase": str(folder), "installed_base": str(folder)}

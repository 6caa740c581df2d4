"""Environments of the other libraries, made when they are first asked for.

`peers/NAME.txt` lists what pip installs, `peers/NAME.no-deps.txt` what it installs without dependencies: those that a
library declares but does not use for training, torchvision among them, are left out.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "bench" / "environments"


def python_of(environment: str | None) -> Path:
    """Return the interpreter of an environment, making it if it is not there; without a name, the running one.

    Raises:
        RuntimeError: pip failed; the message says where its output is.
    """
    if environment is None:
        return Path(sys.executable)
    folder = FOLDER / environment
    python, stamp = folder / "bin" / "python", folder / ".stamp"
    requirements = [ROOT / "benchmarks" / "peers" / f"{environment}{kind}.txt" for kind in ("", ".no-deps")]
    wanted = "\n".join(path.read_text() for path in requirements if path.is_file())
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    logger.warning("making the environment of %s in %s", environment, folder)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "pip.log"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-c", str(ROOT / "constraints.txt")]
    commands = [[sys.executable, "-m", "venv", str(folder)], [*pip, "torch", "numpy"]]
    for path, options in zip(requirements, ([], ["--no-deps"]), strict=True):
        if path.is_file():
            commands.append([*pip, *options, "-r", str(path)])
    with log.open("w") as file:
        for command in commands:
            if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
                raise RuntimeError(f"{' '.join(command)} failed; its output is in {log}")
    stamp.write_text(wanted)
    return python

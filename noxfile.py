"""`make test-pythons`: what needs neither torch nor DeepSpeed, on every Python that this machine has.

A Python that is not there is skipped, and nox says so.
"""

import nox

nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "venv"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCH_FREE = ("-m", "not torch and not deepspeed and not cluster")


@nox.session(python=PYTHONS)
def torch_free(session: nox.Session) -> None:
    """With the newest dependencies."""
    session.install("--quiet", "--editable", ".[test-torch-free]")
    session.run("python", "-m", "pytest", "--quiet", *TORCH_FREE, *session.posargs)


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """With the oldest dependencies that pyproject.toml allows."""
    session.install("--quiet", "--constraint", "tests/oldest.txt", "--editable", ".[test-torch-free]")
    session.run("python", "-m", "pytest", "--quiet", *TORCH_FREE, *session.posargs)

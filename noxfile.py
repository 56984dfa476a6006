"""The tests under each supported version of Python: `nox`, or one of them with `nox -s unit-3.12`."""

import nox

PYTHONS = ["3.11", "3.12", "3.13"]
nox.options.default_venv_backend = "venv"


@nox.session(python=PYTHONS)
def unit(session: nox.Session) -> None:
    """Run the tests that need neither Ray nor an emulator."""
    session.install("--requirement", "requirements-dev.txt")
    session.run("python", "-m", "pytest", "-m", "unit and not slow", "--numprocesses", "2", *session.posargs)


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """Install the package as its users do, and meta-train for seconds outside the checkout."""
    session.install("--requirement", "requirements.txt", ".")
    session.chdir(session.create_tmp())
    session.run("leap-dist", "train", "--preset", "smoke", "--run-dir", "smoke")

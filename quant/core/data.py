"""Where the project's data lies: recipes and calibration sets."""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def locate_data(name: str) -> Path:
    """Return the folder of the project's data called ``name``, such as ``recipes``.

    An installed wheel has it inside the package, a clone beside the package.
    """
    return next(p for p in (_PACKAGE / name, _PACKAGE.parent / name) if p.is_dir())

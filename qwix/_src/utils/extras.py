"""Optional dependencies: one import that says which extra brings what is missing."""

import importlib
import types


class MissingExtraError(ImportError):
    """A package that only an extra of qwix installs is not there."""


def import_extra(module: str, extra: str = "cli") -> types.ModuleType:
    """Imports `module`, or raises an error that names the extra that installs it.

    Raises:
      MissingExtraError: the package is not installed.

    >>> import_extra("json").__name__
    'json'
    >>> try:
    ...     import_extra("no_such_package")
    ... except MissingExtraError as error:
    ...     print(error)
    this needs the package 'no_such_package': pip install 'qwix[cli]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".", maxsplit=1)[0]
        if error.name is not None and error.name.split(".", maxsplit=1)[0] != package:
            raise  # The package is there and is broken itself: its own error says more.
        raise MissingExtraError(f"this needs the package {package!r}: pip install 'qwix[{extra}]'") from error

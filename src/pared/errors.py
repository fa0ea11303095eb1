"""Every error that pared raises on purpose. A message says what must hold, what was found, where, and what to do."""


class ParedError(Exception):
    """Base of all errors raised on purpose; the command line prints them as one line."""

    exit_code = 2


class InputError(ParedError):
    """A model, a loader, a metric or an argument that cannot be used as given."""


class RecipeError(InputError):
    """A recipe with an unknown name, a value out of range or an impossible order."""


class TraceError(InputError):
    """A model whose graph cannot be had."""


class ExportError(ParedError):
    """A model that the asked runtime cannot express."""


class MissingExtra(ParedError):
    """An optional package is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package}, which is not installed; run: pip install 'pared[{extra}]'")


class BudgetError(ParedError):
    """No plan meets the budget; the message says which sites stand in the way."""

    exit_code = 1


class ArtifactError(ParedError):
    """A file that is not a whole, unaltered .pared file of a known version."""


class StoreError(ArtifactError):
    """A coded tensor whose bytes cannot be decoded."""

"""What can go wrong for a user. Libraries raise these; chat and the commands print one line and
exit with 1.
"""


class EngineError(Exception):
    """Base of every error whose text is meant for the user: what, where, expected, found, what to
    do.
    """


class DeviceError(EngineError):
    """No usable adapter, or the adapter cannot hold what was asked of it."""


class DeviceLostError(DeviceError):
    """The adapter is gone, or its driver has given up; the model may be opened again."""


class OutOfMemoryError(DeviceError):
    """An allocation that the adapter refused."""


class WeightsError(EngineError):
    """A weights file or a source model that cannot be read, is damaged, or is of the wrong kind."""


class ConfigError(EngineError):
    """A model whose architecture or sizes this engine does not run."""

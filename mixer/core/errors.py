"""What can go wrong by the user's or the world's doing; our own mistakes are `assert`.

The text of an error says what was found, what was needed and what to do, with the values and
names in it. Errors carry plain arguments, so that they cross processes.
"""


class MixerError(Exception):
    """The root: whoever starts a job catches this one, prints its text and exits non-zero."""


class ConfigError(MixerError):
    """An option, or a set of options, that cannot be obeyed."""


class InfeasibleError(ConfigError):
    """Rules that no mixture satisfies together; `rules` has the keys of those in the text."""

    def __init__(self, text: str, rules: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.rules = rules


class DataError(MixerError):
    """Rows that cannot be read as the manifest promises; names shard and row where it can."""


class ScheduleError(MixerError):
    """A schedule that is damaged, or a row that does not follow from the one before it."""


class ResumeError(MixerError):
    """A saved run that may not be continued with what was given."""


class SignalError(MixerError):
    """A measurement that does not belong where it was sent, or does not add up."""


class CheckpointError(MixerError):
    """A checkpoint that cannot be written, or may not be loaded into what was given."""


class DamagedError(CheckpointError):
    """A checkpoint that is not as it was written; the one before it may still be good."""

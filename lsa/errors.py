"""The one exception that means "the input is at fault", shown to people as a single plain line."""


class InputError(ValueError):
    """Bad input. The message is one line: the value, the rule it breaks, and what to do."""

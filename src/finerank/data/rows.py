"""A row that cannot be used, and why; every part of the pipeline says so in the same way."""


class BadRow(Exception):
    """One row cannot become a sample. `reason` is short and without the row's content, so that equal ones add up.

    Never shown as it is: the receipt counts it, and with `--strict` it becomes a DataError with file and row number.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason

"""Ends a sample at a string, whatever tokens it is made of."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
SPLIT_CHARACTER = "\ufffd"  # what `decode` makes of the beginning of a character whose end is still to come
MAX_SPLIT = 4  # such marks that the beginning of a window may hold


class StopStrings:
    """Watches one sample. Decodes a window of its last tokens only, of some 2 to 4 times the longest string."""

    def __init__(self, strings: Sequence[str], decode: Decode) -> None:
        self.strings, self.decode = strings, decode
        self._reach = max(len(text) for text in strings) + MAX_SPLIT
        self._window: list[int] = []
        self._settled = 0  # tokens of the window before the newest half
        self._text = ""

    def completes(self, token: int) -> bool:
        """Takes the next token: does the text have one of the strings now that it had not before?"""
        before = len(self._text.rstrip(SPLIT_CHARACTER))
        self._window.append(token)
        self._text = self.decode(self._window)
        found = any(self._text.find(text, max(0, before - len(text) + 1)) >= 0 for text in self.strings)
        self._shorten()
        return found

    def _shorten(self) -> None:
        newest = self.decode(self._window[self._settled :]) if len(self._text) > 2 * self._reach else ""
        if len(newest) >= self._reach:
            if self._settled:
                self._window = self._window[self._settled :]
                self._text = newest
            self._settled = len(self._window)

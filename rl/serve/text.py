"""Tokens to text while they arrive: only whole characters leave, and nothing that may be part of a stop string."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class TextStream:
    """The text of one sample."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._backend = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._text, self._sent = "", 0
        self._held = max((len(stop) for stop in stops), default=1) - 1

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make certain."""
        for token in token_ids:
            self._text += self._decoder.step(self._backend, token) or ""
        return self._send(len(self._cut()) if self._stopped() else max(self._sent, len(self._text) - self._held))

    def finish(self, all_token_ids: Sequence[int]) -> str:
        """What is left of the sample's text."""
        self._text = str(self._tokenizer.decode(list(all_token_ids), skip_special_tokens=True))
        return self._send(len(self._cut()))

    def _stopped(self) -> bool:
        return any(stop in self._text for stop in self._stops)

    def _cut(self) -> str:
        return cut_at_stop(self._text, self._stops)

    def _send(self, end: int) -> str:
        start, self._sent = self._sent, max(self._sent, end)
        return self._text[start : self._sent]


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text

"""What can go wrong, as types: every error that this package raises on purpose."""

SHOWN = 100  # characters of a value in a message


class LlavaHvpError(Exception):
    """Base of the package's own errors; the message names the value and the remedy."""


def shown(value: object) -> str:
    """A value as an error message has it: what is long is cut, so that the message stays a line."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return object.__repr__(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 20]}… ({len(text)} characters)"


class OptionError(LlavaHvpError, ValueError):
    """A method, an option or a value that does not exist or is out of range."""


class LayerError(OptionError):
    """A layer outside the encoder, or past the layer whose output is used."""


class ContextError(LlavaHvpError, ValueError):
    """A VisionContext that lacks what the method needs, or has it in the wrong shape."""


class ScoreError(LlavaHvpError, ValueError):
    """Scores that are not finite, as from an overflowing float16 tower."""


class UnsupportedModelError(LlavaHvpError, TypeError):
    """A model or vision tower that cannot be pruned."""


class PrunedStateError(LlavaHvpError, RuntimeError):
    """Pruning what is pruned already, or undoing what is not."""


class DecodingError(LlavaHvpError, RuntimeError):
    """A way of running the language model that pruning inside it cannot follow."""


class PictureError(LlavaHvpError, ValueError):
    """A picture that cannot be read or drawn, or another one than a report is of."""


class TextEncoderError(LlavaHvpError, RuntimeError):
    """A prompt-aware method without a text encoder, a tokenizer or a prompt."""


class UnsupportedVersionError(LlavaHvpError, ImportError):
    """A LLaVA or transformers release outside the supported range."""


class RecordError(LlavaHvpError, RuntimeError):
    """Answers that cannot be vouched for, or a record or report that cannot be written."""


class EvaluationError(LlavaHvpError, RuntimeError):
    """Data that is missing or damaged, answers of other settings, a scorer that fails."""

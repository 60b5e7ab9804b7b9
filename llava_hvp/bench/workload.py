"""What every variant is given: pictures and prompts, the same for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_hvp.checkpoints.conversation import IMAGE
from llava_hvp.checkpoints.variants import Variant
from llava_hvp.errors import OptionError
from llava_hvp.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

if TYPE_CHECKING:
    from llava_hvp.checkpoints.checkpoint import Checkpoint

BEGIN = 1  # <s>


@dataclass(frozen=True)
class Workload:
    """One call's inputs.

    Parameters
    ----------
    ids : Tensor
        (B, L) int64, an image token in each row
    images : Any
        as `Checkpoint.images` gives them
    sizes : list[tuple[int, int]]
        (width, height) of each picture
    new_tokens : int
        of each answer
    """

    ids: Tensor
    images: Any
    sizes: list[tuple[int, int]]
    new_tokens: int

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return len(self.ids)

    @property
    def text_tokens(self) -> int:
        """Text tokens of each prompt."""
        return self.ids.shape[1] - 1

    @property
    def text_behind(self) -> int:
        """Those of them behind the image."""
        return int((self.ids[0] == IMAGE).flip(0).int().argmax())

    @property
    def tiles(self) -> int:
        """That the encoder sees, of all pictures."""
        stacks = self.images if isinstance(self.images, list) else list(self.images)
        return sum(1 if image.ndim == 3 else len(image) for image in stacks)


def make_workload(
    checkpoint: Checkpoint,
    pictures: Sequence[Any],
    prompt: Tensor,
    *,
    new_tokens: int,
    variant: Variant | None = None,
) -> Workload:
    """Process one PIL picture for each row of the batch as the checkpoint's framework does.

    Parameters
    ----------
    prompt : Tensor
        (L,) int64, with one image token
    variant : Variant | None
        for which pictures are cut
    """
    images = checkpoint.images(pictures, variant)
    ids = prompt.to(checkpoint.model.device).expand(len(pictures), -1)
    return Workload(ids, images, [picture.size for picture in pictures], new_tokens)


def random_prompt(tokens: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """(1 + tokens,) int64: BEGIN, some text, an image token, the rest of the text."""
    if tokens < 2:
        raise OptionError(f"{tokens} text tokens: give at least 2")
    # The first 259 ids are bytes and specials, which a tokenizer may not turn into text.
    text = torch.randint(min(259, vocabulary // 2), vocabulary, (tokens - 1,), generator=generator)
    middle = (tokens - 1) // 2
    return torch.cat((torch.tensor([BEGIN]), text[:middle], torch.tensor([IMAGE]), text[middle:]))


def pattern(size: tuple[int, int], seed: int) -> Any:
    """A PIL picture that is nowhere the same: coarse noise, one for each seed."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    cells = tuple(max(1, side // 12) for side in reversed(size))
    noise = torch.randint(0, 256, (*cells, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize(size, Image.Resampling.BICUBIC)

"""A checkpoint of transformers' own LLaVA classes, behind the interface of LLaVA's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava_hvp.checkpoints.chat_templates import TEMPLATES
from llava_hvp.checkpoints.checkpoint import Checkpoint
from llava_hvp.checkpoints.conversation import IMAGE
from llava_hvp.checkpoints.naming import model_name
from llava_hvp.checkpoints.variants import Variant
from llava_hvp.errors import LlavaHvpError, OptionError
from llava_hvp.hosts.hf.forward import short_call
from llava_hvp.hosts.hf.host import HFModel, check_tiling
from llava_hvp.hosts.hf.versions import check_release
from llava_hvp.methods.uniform import Uniform
from llava_hvp.runtime import PruningConfig
from llava_hvp.show.frame import View


class HFCheckpoint(Checkpoint):
    """A loaded `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration`.

    Prompts have one mark an image, as LLaVA's do; `processor` is the checkpoint's whole one, and
    `conv_mode` empty where prompts are in its own chat template.
    """

    host = "transformers"

    @property
    def reader(self) -> Any:
        """What a method reads the prompt with."""
        return self.processor

    @property
    def host_model(self) -> HFModel:
        """The model as the core sees it, pruned or not."""
        pruning = vars(self.model).get("llava_hvp")
        if pruning is not None:
            found: HFModel = pruning.host_model
            return found
        everything = PruningConfig.checked(Uniform(r_max=1))
        return HFModel(self.model, everything, self.processor)

    @property
    def vit(self) -> nn.Module:
        """The vision transformer."""
        model: nn.Module = self.model.model.vision_tower
        return model

    @property
    def stock_tower(self) -> nn.Module:
        """What encodes images where nothing prunes."""
        return self.vit

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        decoder: nn.Module = self.model.model.language_model
        return decoder

    @property
    def select_layer(self) -> int:
        """The layer that goes on, as an index into the hidden states."""
        return int(self.model.config.vision_feature_layer)

    @property
    def tower(self) -> tuple[torch.device, torch.dtype]:
        """Where the tower runs, and in which dtype."""
        encoder = self.host_model.encoder
        return encoder.device, encoder.dtype

    @property
    def cuts_tiles(self) -> bool:
        """Whether it cuts pictures into AnyRes tiles."""
        return bool(self.host_model.family.newline)

    def view(self, tiling: str = "stock") -> View:
        """How the model sees pictures; raises OptionError for a tiling that is not the processor's.

        Parameters
        ----------
        tiling : str
            of a Runtime
        """
        check_tiling(tiling)
        return self.host_model.view()

    def images(self, pictures: Sequence[Any], variant: Variant | None = None) -> Tensor:
        """PIL pictures on the model's device by the checkpoint's own image processor.

        Parameters
        ----------
        variant : Variant | None
            for which they are cut; raises OptionError where its tiling is not the processor's
        """
        check_tiling((variant or Variant()).runtime.tiling)
        made = self.processor.image_processor(images=list(pictures), return_tensors="pt")
        pixels: Tensor = made["pixel_values"]
        return pixels.to(self.model.device, self.dtype)

    def text(self, question: str, images: int = 1) -> str:
        """The question in the chat template, after its pictures unless it places them."""
        content: Any = question
        if images and "<image>" not in question:
            said = {"type": "text", "text": question}
            content = [*[{"type": "image"}] * images, said]
        given = {"chat_template": TEMPLATES[self.conv_mode]} if self.conv_mode else {}
        return str(
            self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=False,
                **given,
            )
        )

    def prompt(self, question: str, images: int = 1) -> Tensor:
        """(L,) token ids of `text`, a mark for each image, on the model's device."""
        ids = self.tokenizer(self.text(question, images), return_tensors="pt")["input_ids"][0]
        ids = ids.masked_fill(ids == self.model.config.image_token_id, IMAGE)
        marked: Tensor = ids.to(self.model.device)
        return marked

    def generate(
        self,
        ids: Tensor,
        images: Any = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        attention_mask: Tensor | None = None,
        **generation: Any,
    ) -> Tensor:
        """(B, new) token ids of answers; arguments as LLaVA's `generate` takes them."""
        call = self._call(ids, images, image_sizes, attention_mask)
        output: Tensor = self.model.generate(**call, **generation)
        return output[:, call["input_ids"].shape[1] :]

    def generate_of(self) -> Callable[..., Any]:
        """`generate` as a function of the model."""
        return lambda model, *args, **kwargs: self.generate(*args, **kwargs)

    def prepare(self, ids: Tensor, images: Any, image_sizes: Any) -> dict[str, Any]:
        """From prompts and images to what the language model gets."""
        call = self._call(ids, images, image_sizes, None)
        pruning = vars(self.model).get("llava_hvp")
        if pruning is not None:
            return short_call(pruning, call)
        inner = self.model.model
        embeds = self.model.get_input_embeddings()(call["input_ids"])
        names = ("pixel_values", "image_sizes")
        found = inner.get_image_features(**{name: call[name] for name in names if name in call})
        features = torch.cat([*getattr(found, "pooler_output", found)]).to(embeds)
        placeholder = (call["input_ids"] == self.model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(placeholder, features)
        return {"inputs_embeds": embeds, "attention_mask": call["attention_mask"]}

    def _call(
        self, ids: Tensor, images: Any, image_sizes: Any, mask: Tensor | None
    ) -> dict[str, Any]:
        """Arguments of stock's forward: every mark as many placeholders as stock sends tokens."""
        mask = torch.ones_like(ids) if mask is None else mask.long()
        if images is None:
            return {"input_ids": ids, "attention_mask": mask}
        host, call = self.host_model, {"pixel_values": images}
        sizes = list(image_sizes or [None] * len(images))
        if host.family.newline:
            call["image_sizes"] = torch.tensor([size[::-1] for size in sizes])
        _, tiles = host.family.tiles(self.model.model, images, sizes, call)
        stock = iter(
            host.layout(count, size, "stock").stock_tokens
            for count, size in zip(tiles, sizes, strict=True)
        )
        token, rows = self.model.config.image_token_id, []
        for row, real in zip(ids, mask, strict=True):
            times = [next(stock) if n == IMAGE else 1 for n in row[real.bool()].tolist()]
            rows.append(row[real.bool()].repeat_interleave(torch.tensor(times, device=row.device)))
        length = max(map(len, rows))
        whole = torch.stack([_left(row, length, self._pad_id) for row in rows])
        real = torch.stack([_left(torch.ones_like(row), length, 0) for row in rows])
        whole = whole.masked_fill(whole == IMAGE, token)
        return {"input_ids": whole, "attention_mask": real, **call}


def _left(row: Tensor, length: int, padding: int) -> Tensor:
    return torch.cat((row.new_full((length - len(row),), padding), row))


def open_hf(
    path: str,
    device: str,
    *,
    base: str | None,
    bits: int | None,
    dtype: torch.dtype,
    conv_mode: str | None,
    device_map: str | None,
) -> HFCheckpoint:
    """A checkpoint by `from_pretrained`; see `open_checkpoint`.

    Raises OptionError for what cannot be loaded, UnsupportedVersionError on older releases.
    """
    check_release()
    if base is not None:
        raise OptionError(f"--model-base {base}: {path} is in transformers' form, and has no base")
    if conv_mode is not None and conv_mode not in TEMPLATES:
        raise OptionError(
            f"--conv-mode {conv_mode}: for a checkpoint in transformers' form give one of "
            f"{', '.join(TEMPLATES)}, or none for its own chat template"
        )
    given: dict[str, Any] = {"dtype": dtype, "device_map": device_map or device}
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        if bits is not None:
            given["quantization_config"] = _quantization(bits)
        model = AutoModelForImageTextToText.from_pretrained(path, **given).eval()
        processor = AutoProcessor.from_pretrained(path)
    except LlavaHvpError:
        raise
    except Exception as error:  # a hub, a file format, a shape: it cannot be loaded
        reason = " ".join(str(error).split())[:300]
        raise OptionError(f"--model-path {path}: transformers cannot load it: {reason}") from error
    if conv_mode is None and processor.chat_template is None:
        raise OptionError(
            f"--model-path {path}: its processor has no chat template: give --conv-mode, one of "
            f"{', '.join(TEMPLATES)}"
        )
    name = model_name(path)
    return HFCheckpoint(name, processor.tokenizer, model, processor, dtype, conv_mode or "")


def _quantization(bits: int) -> Any:
    """As LLaVA's --load-4bit and --load-8bit."""
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
    )

"""The page itself: a picture and a question on the left, answers side by side on the right."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_hvp.app.cards import CSS, cards, failed
from llava_hvp.app.comparing import Answer
from llava_hvp.errors import LlavaHvpError

BUDGETS = (0.75, 0.5, 0.4, 0.25, 0.11)
DAY = 86_400  # seconds, after which pictures of visitors are thrown away, as they are at the end

# (picture, question, methods, budgets) -> answers, one by one.
Ask = Callable[[Any, str, Sequence[str], Sequence[float]], Iterator[Answer]]


def build(
    ask: Ask,
    name: str,
    methods: Sequence[str],
    *,
    ticked: Sequence[str],
    budgets: Sequence[float],
    examples: Sequence[tuple[Path, str]],
) -> Any:
    """The page as Gradio's Blocks.

    Parameters
    ----------
    name : str
        the model's
    methods, ticked : Sequence[str]
        that can be chosen, and that are chosen at first
    budgets : Sequence[float]
        r_max that are chosen at first
    examples : Sequence[tuple[Path, str]]
        pictures with a question about each
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which reads it
    import gradio

    choices = sorted({*BUDGETS, *budgets}, reverse=True)
    labelled = [(f"{budget:.0%}", budget) for budget in choices]
    title = f"{name}, pruned"
    page = gradio.Blocks(
        title=title, analytics_enabled=False, fill_width=True, delete_cache=(DAY, DAY)
    )
    with page:
        gradio.Markdown(
            f"# {title}\nThe same question to `{name}` with all visual tokens, and with what each "
            "method keeps of them. Darkened patches are pruned: the language model never sees them."
        )
        with gradio.Row():
            with gradio.Column(scale=1, min_width=320):
                image = gradio.Image(
                    type="pil",
                    label="Picture",
                    height=280,
                    sources=["upload", "clipboard"],
                    elem_id="picture",
                )
                question = gradio.Textbox(label="Question", elem_id="question", lines=1)
                chosen = gradio.CheckboxGroup(list(methods), value=list(ticked), label="Methods")
                kept = gradio.CheckboxGroup(
                    labelled, value=list(budgets), label="Kept at most, of all patches"
                )
                button = gradio.Button("Compare", variant="primary", elem_id="compare")
                if examples:
                    gradio.Examples(
                        [[str(path), text] for path, text in examples],
                        [image, question],
                        label="Examples",
                    )
            with gradio.Column(scale=3):
                shown = gradio.HTML("Answers come here.", elem_id="answers")
        inputs = [image, question, chosen, kept]
        respond = responder(ask)
        gradio.on([button.click, question.submit], respond, inputs, shown, show_progress="minimal")
    return page


def responder(ask: Ask) -> Callable[[Any, str, list[str], list[float]], Iterator[str]]:
    """What the button does: the cards so far, again with each answer; errors as a line of text."""

    def respond(
        image: Any, question: str, methods: list[str], budgets: list[float]
    ) -> Iterator[str]:
        found: list[Answer] = []
        total = 1 + len(methods) * len(budgets)
        try:
            for answer in ask(image, question, methods, budgets):
                found.append(answer)
                yield cards(found, total - len(found))
        except LlavaHvpError as error:
            yield failed(str(error))
        except Exception as error:  # out of memory, a picture of no size: whatever it is, said
            traceback.print_exc(file=sys.stderr)
            yield failed(f"{type(error).__name__}: {error}")

    return respond


def serve(page: Any, host: str, port: int | None, said: Callable[[str], None]) -> None:
    """Until it is stopped.

    Parameters
    ----------
    port : int | None
        the first free one from 7860 on for None
    said : Callable[[str], None]
        called with the address
    """
    import gradio

    # No font and no script from elsewhere: the page works without a network.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=True,
        footer_links=[],
        ssr_mode=False,
        theme=theme,
        css=CSS,
    )
    said(address)
    page.block_thread()

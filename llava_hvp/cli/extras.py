"""What commands need beyond torch and transformers, and which extra of ours brings it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from llava_hvp.console import say
from llava_hvp.errors import OptionError
from llava_hvp.version import version_of


@dataclass(frozen=True)
class Needed:
    """A distribution that some commands import.

    Parameters
    ----------
    module : str
        what is imported of it
    extra : str
        of llava-hvp, which brings it
    uses : str
        what needs it, in words
    """

    distribution: str
    module: str
    extra: str
    uses: str

    @property
    def version(self) -> str | None:
        """What is installed, None where it is missing."""
        if not is_there(self.module):
            return None
        return version_of(self.distribution) or "of unknown version"


HOST = "host"  # without it LLaVA loads nothing
EVERY = "every LLaVA checkpoint"
MMBENCH = "LLaVA's model_vqa_mmbench and llava-hvp eval mmbench"
WORKER = "LLaVA's controller and model_worker"
NEEDED = (
    Needed("accelerate", "accelerate", HOST, EVERY),
    Needed("einops", "einops", HOST, EVERY),
    Needed("pillow", "PIL", HOST, EVERY),
    Needed("protobuf", "google.protobuf", HOST, EVERY),
    Needed("requests", "requests", HOST, EVERY),
    Needed("sentencepiece", "sentencepiece", HOST, EVERY),
    Needed("shortuuid", "shortuuid", HOST, "LLaVA's eval scripts and llava-hvp eval"),
    Needed("matplotlib", "matplotlib", "plots", "plots of llava-hvp accuracy, bench and table"),
    Needed("bitsandbytes", "bitsandbytes", "quantized", "--load-4bit and --load-8bit"),
    Needed("peft", "peft", "lora", "LoRA checkpoints"),
    Needed("deepspeed", "deepspeed", "deepspeed", "training and generation in several processes"),
    Needed("fastapi", "fastapi", "worker", WORKER),
    Needed("uvicorn", "uvicorn", "worker", WORKER),
    Needed("pandas", "pandas", "mmbench", MMBENCH),
    Needed("openpyxl", "openpyxl", "mmbench", MMBENCH),
    Needed("gradio", "gradio", "app", "llava-hvp demo-app"),
    Needed("lmms-eval", "lmms_eval", "lmms", "llava-hvp reproduce of tables made with lmms-eval"),
)


def is_there(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a package that is not there
        return False


def install(extra: str) -> str:
    """What to type for an extra."""
    return f"pip install 'llava-hvp[{extra}]'"


def need(extra: str, *modules: str) -> None:
    """Raise OptionError with the extra to install, unless the modules are there."""
    for module in modules:
        if not is_there(module):
            raise OptionError(f"{module} is missing: {install(extra)}")


def can_plot() -> bool:
    """Whether plots can be drawn; where not, what is missing has been said."""
    if is_there("matplotlib"):
        return True
    say(f"matplotlib is missing, so there will be no plot: {install('plots')}")
    return False

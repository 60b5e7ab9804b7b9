"""Training-free visual token pruning for LLaVA: HIVTP, HiPrune and HiPrune++.

Importing this package imports neither torch, LLaVA nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llava_hvp.errors import LlavaHvpError
from llava_hvp.given import config_of
from llava_hvp.hosts import host_of
from llava_hvp.methods import get_method, list_methods
from llava_hvp.methods.base import Method, Mix, Needs, Selection, VisionContext, VisionMethod
from llava_hvp.methods.cdpruner import CDPruner
from llava_hvp.methods.divprune import DivPrune
from llava_hvp.methods.fastervlm import FasterVLM
from llava_hvp.methods.fastv import FastV
from llava_hvp.methods.fopru import FoPru
from llava_hvp.methods.hiprune import HiPrune
from llava_hvp.methods.hipruneplus import HiPrunePlus
from llava_hvp.methods.hired import HiRED
from llava_hvp.methods.hivtp import HIVTP
from llava_hvp.methods.language import LanguageMethod
from llava_hvp.methods.mmtok import MMTok
from llava_hvp.methods.prumerge import PruMerge
from llava_hvp.methods.prumergeplus import PruMergePlus
from llava_hvp.methods.pyramiddrop import PyramidDrop
from llava_hvp.methods.random import Random
from llava_hvp.methods.scope import SCOPE
from llava_hvp.methods.sparsevlm import SparseVLM
from llava_hvp.methods.uniform import Uniform
from llava_hvp.methods.visionzip import VisionZip
from llava_hvp.methods.vispruner import VisPruner
from llava_hvp.runtime import PruningConfig, Runtime
from llava_hvp.tuned import load_method
from llava_hvp.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from llava_hvp.encoder.text import ClipText
    from llava_hvp.pruning.pruning import Pruning

__all__ = [
    "HIVTP",
    "SCOPE",
    "CDPruner",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "FoPru",
    "HiPrune",
    "HiPrunePlus",
    "HiRED",
    "LanguageMethod",
    "LlavaHvpError",
    "MMTok",
    "Method",
    "Mix",
    "Needs",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "Random",
    "Runtime",
    "Selection",
    "SparseVLM",
    "Uniform",
    "VisPruner",
    "VisionContext",
    "VisionMethod",
    "VisionZip",
    "__version__",
    "get_method",
    "install",
    "list_methods",
    "load_method",
    "prune",
    "uninstall",
    "unprune",
]


def prune(
    model: Any,
    method: Method | PruningConfig | str,
    inside: LanguageMethod | str | None = None,
    *,
    runtime: Runtime | None = None,
    tokenizer: Any = None,
    clip_text: str | Path | ClipText | None = None,
    **options: Any,
) -> Pruning:
    """Prune the visual tokens of a loaded LLaVA model.

    Stays until `unprune(model)`, or until the end of the block in
    `with prune(model, HIVTP(r_max=0.5)) as pruned:`. `pruned.last` reports on the newest call,
    an entry an image.

    Parameters
    ----------
    model : Any
        what LLaVA's `load_pretrained_model` gives, transformers' own
        LlavaForConditionalGeneration, LlavaNextForConditionalGeneration,
        LlavaOnevisionForConditionalGeneration or Qwen2_5_VLForConditionalGeneration, or a wrapper
        around one of them (PEFT, DDP)
    method : Method | PruningConfig | str
        a Method, as `HIVTP(r_max=0.5)`, or its name: `prune(model, "hivtp", r_max=0.5)`; "none"
        prunes nothing, for a model whose blocks and calls choose, by `Pruning.using`. Or what
        `load_method("tuned.json")` gives, which stands for `inside` and `runtime` too
    inside : LanguageMethod | str | None
        a second method, inside the language model, of what the first one sends:
        `prune(model, HIVTP(r_max=0.5), FastV(r_max=0.5))`; by name
        `prune(model, "hivtp+fastv", r_max=0.5, inside_r_max=0.5)`
    runtime : Runtime | None
        how the model runs, as `Runtime(patch_merge="spatial")`; the same for every method
    tokenizer : Any
        the language model's, or transformers' processor; only prompt-aware methods use it, and by
        default load it from the model's own checkpoint
    clip_text : str | Path | ClipText | None
        name or folder of the CLIP that the vision tower came from, for methods that read the prompt
        with its text encoder. By default the one that LLaVA's config names, or that the shape of a
        transformers model's tower is known of
    **options : Any
        of a method that is given by name, and of its `Runtime`, as flags and results write them

    Raises
    ------
    LlavaHvpError
        an unknown method or option, not a LLaVA model, no vision tower or one that cannot be read,
        already pruned, layers or a budget that this tower cannot meet, no text encoder. The model
        is as before.
    """
    chosen = config_of(method, inside, runtime, options)
    given = chosen.arguments | ({} if clip_text is None else {"clip_text": clip_text})
    return host_of(model).attach(model, **given, tokenizer=tokenizer)


def unprune(model: Any) -> None:
    """Give the model back as it was before `prune`; raises LlavaHvpError if it is not pruned."""
    host_of(model).detach(model)


def install(
    method: Method | PruningConfig | str,
    inside: LanguageMethod | str | None = None,
    *,
    runtime: Runtime | None = None,
    tokenizer: Any = None,
    clip_text: str | Path | ClipText | None = None,
    on_model: Callable[[Pruning], None] | None = None,
    **options: Any,
) -> None:
    """Prune every LLaVA that is loaded from now on, for code that loads its model by itself.

    LLaVA's own `load_pretrained_model` gives then what `prune` would; whoever imported it before is
    served too. A model loaded so stays pruned until `unprune(model)`, also after `uninstall()`.
    Imports LLaVA.

    Parameters
    ----------
    method, inside, runtime, tokenizer, clip_text, options : Any
        as for `prune`
    on_model : Callable[[Pruning], None] | None
        called with the `Pruning` of each model that is built

    Raises
    ------
    LlavaHvpError
        a method is installed already, it is no method, or this LLaVA or transformers is not
        supported
    """
    from llava_hvp.hosts.llava import builder

    chosen = config_of(method, inside, runtime, options)
    given = chosen.arguments | ({} if clip_text is None else {"clip_text": clip_text})
    builder.install(**given, tokenizer=tokenizer, on_model=on_model)


def uninstall() -> None:
    """The stock loader gives stock models again; raises LlavaHvpError if nothing is installed."""
    from llava_hvp.hosts.llava import builder

    builder.uninstall()

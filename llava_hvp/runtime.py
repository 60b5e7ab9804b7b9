"""How a method is run on a model: options of the host and its tower, which choose no patch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from llava_hvp.errors import OptionError, UnsupportedModelError, shown
from llava_hvp.methods import check_known, get_method, method_class
from llava_hvp.methods.base import Method, VisionMethod, vision_method
from llava_hvp.methods.checks import choice
from llava_hvp.methods.everything import Everything
from llava_hvp.methods.language import LanguageMethod

BUDGET = ("r_max", "num_tokens")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a pruned model runs, whatever the method.

    Parameters
    ----------
    patch_merge : str
        "stock" packs LLaVA-NeXT tiles as the checkpoint says; "spatial" without unpad and newlines
    newline : str
        mosaic rows that end in an image_newline: "rows" with a kept patch, "all" or "none"
    tower_attention : str
        "sdpa" replaces the vision tower's eager attention by torch's fused one, as transformers
        before 4.46 has none (the same up to rounding, which in half precision moves choices between
        patches); "stock" leaves it, as the released codes do
    tower_dtype : str
        "model" runs the tower in the dtype of the images, which is the language model's; "stock" in
        its own, float32 where LLaVA's scripts load a LLaVA-1.5

    With a method that keeps all (r_max=1) the tower is stock's whatever the last two say.

    Raises
    ------
    OptionError
        for an option out of its range
    """

    name: ClassVar[str] = "Runtime"  # before what is wrong with an option

    patch_merge: str = "stock"
    newline: str = "rows"
    tower_attention: str = "sdpa"
    tower_dtype: str = "stock"

    def __post_init__(self) -> None:
        choice(self, "patch_merge", ("stock", "spatial"))
        choice(self, "newline", ("rows", "all", "none"))
        choice(self, "tower_attention", ("sdpa", "stock"))
        choice(self, "tower_dtype", ("stock", "model"))


RUNTIME_OPTIONS = tuple(field.name for field in fields(Runtime))


@dataclass(frozen=True)
class PruningConfig:
    """Methods and how to run them: all that a command says of pruning.

    Parameters
    ----------
    method : VisionMethod
        at the vision tower; keeps all where only `inside` prunes
    inside : LanguageMethod | None
        inside the language model, of what `method` sends
    """

    method: VisionMethod
    runtime: Runtime = Runtime()
    inside: LanguageMethod | None = None

    @classmethod
    def checked(cls, method: Any, runtime: Any = None, inside: Any = None) -> PruningConfig:
        """What a user gives to `prune`; no runtime is the default one.

        Raises
        ------
        UnsupportedModelError
            no Method, or one at another place than it was given for
        OptionError
            no Runtime, or two methods inside the language model
        """
        if not isinstance(runtime, (Runtime, type(None))):
            raise OptionError(
                f"runtime={shown(runtime)} is no Runtime: give one, as Runtime(newline='all')"
            )
        runtime = runtime or Runtime()
        if isinstance(method, LanguageMethod):
            if inside is not None:
                raise OptionError(
                    f"{method.name} and {inside!r} both prune inside the language model: give one"
                )
            return cls(Everything(), runtime, method)
        if inside is not None and not isinstance(inside, LanguageMethod):
            raise UnsupportedModelError(
                f"{inside!r} does not prune inside the language model: give a LanguageMethod, or "
                "one method alone"
            )
        return cls(vision_method(method), runtime, inside)

    @classmethod
    def of(cls, name: str, **options: Any) -> PruningConfig:
        """By the method's name and the options of both, as flags and results write them.

        Raises OptionError for an unknown name, option or value; the message lists the valid ones.
        """
        check_known(name, options, options_of(method_class(name)))
        shared = {key: options.pop(key) for key in RUNTIME_OPTIONS if key in options}
        return cls(vision_method(get_method(name, **options)), Runtime(**shared))

    @property
    def options(self) -> dict[str, Any]:
        """Every option of both."""
        return asdict(self.method) | asdict(self.runtime)

    @property
    def given(self) -> dict[str, Any]:
        """The budget, and the options of both that differ from their defaults."""
        own, shared = _changed(self.method), _changed(self.runtime)
        budget = {name: own.pop(name) for name in BUDGET if name in own}
        return budget | shared | own

    def __str__(self) -> str:
        """As `hivtp r_max=0.5`."""
        return " ".join([self.method.name, *(f"{n}={v}" for n, v in self.given.items())])


def options_of(kind: type[Method]) -> list[str]:
    """Names of the options that a method can be given, those of its run included."""
    own = (field.name for field in fields(kind))
    return [*BUDGET, *RUNTIME_OPTIONS, *(name for name in own if name not in BUDGET)]


def _changed(options: Any) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(options)}
    return {n: getattr(options, n) for n in defaults if getattr(options, n) != defaults[n]}

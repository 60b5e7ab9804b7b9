"""How a method is run on a model: options of the host and its tower, which choose no patch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from llava_hvp.errors import OptionError, UnsupportedModelError, shown
from llava_hvp.methods import (
    NONE,
    check_known,
    list_methods,
    method_class,
    method_spec,
    source_of,
)
from llava_hvp.methods.base import Method, VisionMethod, vision_method
from llava_hvp.methods.checks import choice
from llava_hvp.methods.language import LanguageMethod
from llava_hvp.methods.unpruned import Unpruned

BUDGET = ("r_max", "num_tokens")
JOINED = "+"  # between the names of two methods, as hivtp+fastv
INSIDE = "inside_"  # before an option of the second of them
CLIP_TEXT = "clip_text"  # the option that names a CLIP
_DEEP = 1000  # layers of a tower that has any that a method may ask
_PATH = re.compile(r"[^\W\d][\w.]*:[\w.]+")  # module:Class


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a pruned model runs, whatever the method.

    Parameters
    ----------
    tiling : str
        "stock" cuts LLaVA-NeXT's pictures by the checkpoint's `image_grid_pinpoints`; "672" every
        picture into 2 x 2 tiles and the base tile, which is 672 x 672 pixels for a tower of 336 (of
        another, twice its side), as in the published tables of VisPruner, CDPruner and those that
        follow them
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

    tiling: str = "stock"
    patch_merge: str = "stock"
    newline: str = "rows"
    tower_attention: str = "sdpa"
    tower_dtype: str = "stock"

    def __post_init__(self) -> None:
        if self.tiling == 672:  # as one would write it in Python
            object.__setattr__(self, "tiling", "672")
        choice(self, "tiling", ("stock", "672"))
        choice(self, "patch_merge", ("stock", "spatial"))
        choice(self, "newline", ("rows", "all", "none"))
        choice(self, "tower_attention", ("sdpa", "stock"))
        choice(self, "tower_dtype", ("stock", "model"))

    @property
    def packs_as_stock(self) -> bool:
        """Whether an image's tokens are laid out as LLaVA does, where every patch stays."""
        return self.patch_merge == "stock" and self.newline != "none"


RUNTIME_OPTIONS = tuple(field.name for field in fields(Runtime))


@dataclass(frozen=True)
class PruningConfig:
    """Methods and how to run them: all that a command says of pruning.

    LLaVA without us is none of these; unpruned LLaVA by another tiling or packing is one.

    Parameters
    ----------
    method : VisionMethod
        at the vision tower; `Unpruned` where only `inside` prunes, or nothing
    inside : LanguageMethod | None
        inside the language model, of what `method` sends
    clip_text : str | None
        name or folder of the CLIP whose text encoder reads the prompt; None for the one that the
        checkpoint names, or the shape of its tower is known of
    tower : str | None
        the vision tower that the options were tuned for, as `encoder.digest` has it: another one
        is refused; None for any

    Raises OptionError for an option of the run that nothing would come of.
    """

    method: VisionMethod
    runtime: Runtime = Runtime()
    inside: LanguageMethod | None = None
    clip_text: str | None = None
    tower: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tower, (str, type(None))) or (self.tower or ":").count(":") != 1:
            raise OptionError(
                f"{self.name}: the vision tower {shown(self.tower)} is no hash of one: leave it out"
            )
        if self.clip_text is not None and not (self.clip_text and self.reads_by_clip):
            raise OptionError(
                f"{self.name}: {CLIP_TEXT}={shown(self.clip_text)}: it names the CLIP by which a "
                "method reads the prompt, as hiprune++ and cdpruner do: leave it out"
            )
        if self.methods[0] is self.inside and self.runtime.tower_dtype != "stock":
            raise OptionError(
                f"{self.name}: tower_dtype={self.runtime.tower_dtype}: the tower stays stock's "
                "where only the language model prunes: leave it out"
            )

    @classmethod
    def checked(
        cls, method: Any, runtime: Any = None, inside: Any = None, clip_text: str | None = None
    ) -> PruningConfig:
        """What a user gives to `prune`; no runtime is the default one.

        What `load_method` gave is taken as it is.

        Raises
        ------
        UnsupportedModelError
            no Method, or one at another place than it was given for
        OptionError
            no Runtime, or two methods inside the language model; a tuned method with either
        """
        if isinstance(method, cls):
            if runtime is not None or inside is not None:
                raise OptionError(
                    f"{method.name} was loaded with its running: give neither runtime nor inside"
                )
            return method
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
            return cls(Unpruned(), runtime, method, clip_text)
        if inside is not None and not isinstance(inside, LanguageMethod):
            raise UnsupportedModelError(
                f"{inside!r} does not prune inside the language model: give a LanguageMethod, or "
                "one method alone"
            )
        return cls(vision_method(method), runtime, inside, clip_text)

    @classmethod
    def of(cls, name: str, **options: Any) -> PruningConfig:
        """By name and options, as flags and results write them.

        `of("hivtp+fastv", r_max=0.5, inside_r_max=0.5)` is HIVTP(r_max=0.5) and FastV(r_max=0.5).

        `none` is unpruned, whatever its budget. Raises OptionError for an unknown name, option or
        value; the message lists the valid ones.
        """
        kinds = (Unpruned,) if name == NONE else method_classes(name)
        check_known(name, options, options_of(*kinds))
        shared = {key: options.pop(key) for key in RUNTIME_OPTIONS if key in options}
        clip_text = options.pop(CLIP_TEXT, None)
        given: list[dict[str, Any]] = [{}, {}]
        for key, value in options.items():
            is_second = len(kinds) > 1 and key.startswith(INSIDE)
            given[is_second][key[len(INSIDE) :] if is_second else key] = value
        methods = [kind(**own) for kind, own in zip(kinds, given, strict=False)]
        inside = methods[1] if len(methods) > 1 else None
        return cls.checked(methods[0], Runtime(**shared), inside, clip_text)

    @property
    def prunes(self) -> bool:
        """Whether this leaves out any patch by itself; not so `none`, with options of a Runtime."""
        return self.inside is not None or not isinstance(self.method, Unpruned)

    @property
    def reads_by_clip(self) -> bool:
        """Whether CLIP's text encoder reads the prompt for it."""
        return self.method.reads(_DEEP, _DEEP).relevance == "clip"

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that prune, in their order."""
        if self.inside is None:
            return (self.method,)
        alone = isinstance(self.method, Unpruned)
        return (self.inside,) if alone else (self.method, self.inside)

    @property
    def name(self) -> str:
        """As `hivtp`, `fastv` or `hivtp+fastv`."""
        return JOINED.join(method.name for method in self.methods)

    @property
    def spec(self) -> str:
        """The name by which `of` finds the methods again, in another process too."""
        return JOINED.join(method_spec(type(method)) for method in self.methods)

    @property
    def source(self) -> dict[str, str]:
        """What tells two versions of somebody's own methods apart."""
        sources = [source_of(type(method)) for method in self.methods]
        return {
            INSIDE * number + key: value
            for number, source in enumerate(sources)
            for key, value in source.items()
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """What to put on a model, by the names that `prune` and `install` have for it."""
        return {"method": self, **self._clip}

    @property
    def _clip(self) -> dict[str, str]:
        return {} if self.clip_text is None else {CLIP_TEXT: self.clip_text}

    @property
    def options(self) -> dict[str, Any]:
        """Every option of the methods and of their run."""
        first, *second = map(asdict, self.methods)
        return first | asdict(self.runtime) | self._clip | _prefixed(*second)

    @property
    def given(self) -> dict[str, Any]:
        """The budgets, and the options that differ from their defaults."""
        first, *second = map(_given, self.methods)
        budget = {name: first.pop(name) for name in BUDGET if name in first}
        return budget | _changed(self.runtime) | first | self._clip | _prefixed(*second)

    @property
    def budget(self) -> str:
        """What methods at an equal budget have in common, as `r_max=0.25`; "" for none in words.

        Of two methods it is the average over the language model's layers: shares multiply.
        """
        first, *second = self.methods
        if second and first.r_max is not None and second[0].r_max is not None:
            return f"r_max={round(first.r_max * second[0].r_max, 4)}"
        own = _changed((second or [first])[0])
        return " ".join(
            f"{n}={own[n]}" for n in BUDGET if n in own and (not second or n != "r_max")
        )

    def __str__(self) -> str:
        """As `hivtp r_max=0.5`."""
        return " ".join([self.name, *(f"{n}={v}" for n, v in self.given.items())])


def method_classes(spec: str) -> tuple[type[Method], ...]:
    """The class behind a name, or both behind two that are joined, as `hivtp+fastv`.

    Raises OptionError for an unknown name, or two of which not the second alone prunes inside the
    language model.
    """
    names = _split(spec)
    kinds = tuple(method_class(name) for name in names)
    if len(kinds) == 1:
        return kinds
    insides = [issubclass(kind, LanguageMethod) for kind in kinds]
    if insides == [False, True]:
        return kinds
    if all(insides):
        why = "both prune inside the language model: give one of them"
    elif any(insides):
        why = f"{names[0]} prunes inside the language model: give it second, {names[1]} first"
    else:
        why = f"{names[1]} prunes at the vision tower, not inside the language model: there prune "
        why += ", ".join(list_methods(LanguageMethod))
    raise OptionError(f"{JOINED.join(names)}: {why}")


def _split(spec: str) -> tuple[str, ...]:
    """One name or two; a name may have a + of its own, as hiprune++."""
    known = list_methods()
    if spec not in known:
        for at in (at for at, letter in enumerate(spec) if letter == JOINED):
            parts = spec[:at], spec[at + 1 :]
            if all(part in known or _PATH.fullmatch(part) for part in parts):
                return parts
    return (spec,)


def options_of(kind: type[Method], inside: type[Method] | None = None) -> list[str]:
    """Names of the options that methods can be given, those of their run included."""
    own = [*BUDGET, *RUNTIME_OPTIONS, CLIP_TEXT, *_own_options(kind)]
    if inside is None:
        return own
    return [*own, *(INSIDE + name for name in (*BUDGET, *_own_options(inside)))]


def _own_options(kind: type[Method]) -> list[str]:
    return [field.name for field in fields(kind) if field.name not in BUDGET]


def _prefixed(*options: dict[str, Any]) -> dict[str, Any]:
    return {INSIDE + name: value for given in options for name, value in given.items()}


def _given(method: Method) -> dict[str, Any]:
    """Its budget first."""
    changed = _changed(method)
    return {name: changed[name] for name in BUDGET if name in changed} | changed


def _changed(options: Any) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(options)}
    return {n: getattr(options, n) for n in defaults if getattr(options, n) != defaults[n]}

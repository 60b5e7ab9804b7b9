"""What is compared: unpruned LLaVA, a method at a budget, and the floor below each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from llava_hvp.checkpoints.geometry import Vision
from llava_hvp.errors import OptionError, shown
from llava_hvp.methods import NONE, list_methods
from llava_hvp.methods.base import Method, Needs, Selection, VisionContext, VisionMethod
from llava_hvp.options import read_option, unpruned
from llava_hvp.runtime import (
    BUDGET,
    CLIP_TEXT,
    INSIDE,
    JOINED,
    RUNTIME_OPTIONS,
    PruningConfig,
    Runtime,
    method_classes,
    options_of,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Variant:
    """What is put on a model to be compared: a method at a budget, or nothing.

    Parameters
    ----------
    pruning : PruningConfig | None
        None for LLaVA without us, unpruned with a tiling or packing of its own
    all_attentions : bool
        see as the released methods do, for comparison
    """

    pruning: PruningConfig | None = None
    all_attentions: bool = False

    @classmethod
    def of(cls, by: PrunedBy) -> Variant:
        """Whatever prunes, as a variant: a method alone is run by the defaults."""
        if isinstance(by, Variant):
            return by
        if by is None or isinstance(by, PruningConfig):
            return cls(by)
        return cls(PruningConfig.checked(by))

    @property
    def prunes(self) -> bool:
        """False for unpruned LLaVA."""
        return self.pruning is not None and self.pruning.prunes

    @property
    def runtime(self) -> Runtime:
        """How it is run."""
        return Runtime() if self.pruning is None else self.pruning.runtime

    @property
    def name(self) -> str:
        """The method's name, that of both as `hivtp+fastv`, or none."""
        name = NONE if self.pruning is None else self.pruning.name
        return name + ", all attentions" * self.all_attentions

    @property
    def options(self) -> str:
        """The method's options in words, as `r_max=0.5`."""
        return "" if self.pruning is None else str(self.pruning).partition(" ")[2]

    @property
    def summary(self) -> str:
        """What its methods do, in words."""
        if self.pruning is None:
            return "LLaVA without pruning"
        return "; then ".join(type(method).summary for method in self.pruning.methods)

    def needs(self, vision: Vision) -> Needs:
        """What it reads of the encoder or the prompt."""
        if self.pruning is None:
            return Needs()
        return self.pruning.method.needs(vision.layers, vision.select)

    def __str__(self) -> str:
        return f"{self.name} {self.options}".strip()

    def captures(self, vision: Vision) -> bool:
        """Whether it reads anything of the encoder or the prompt."""
        return self.needs(vision) != Needs()

    def has_floor(self, vision: Vision) -> bool:
        """Whether it pays for its choice, and so has a floor below it."""
        inside = self.pruning is not None and self.pruning.inside is not None
        return inside or self.captures(vision)


PrunedBy = Variant | PruningConfig | Method | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Floor(VisionMethod):
    """Keeps what another method kept, known beforehand: captures nothing, chooses nothing.

    `random` at the same count on every tile, less its draw: what the model would take had the
    image only the kept tokens to begin with. Where a method prunes inside the language model, as
    many as enter a layer on average.

    Parameters
    ----------
    keep : Tensor
        (T, N) bool, on the CPU
    """

    name: ClassVar[str] = "floor"
    summary: ClassVar[str] = "a selection that is there already"
    roles: ClassVar[tuple[str, ...]] = ("floor",)
    listed: ClassVar[bool] = False

    keep: Tensor

    @classmethod
    def below(cls, method: VisionMethod, keep: Tensor) -> Floor:
        """The floor of a method that kept `keep`."""
        shared = {field.name: getattr(method, field.name) for field in fields(Method)}
        return cls(keep=keep, **shared)

    def choose(self, context: VisionContext, budget: int) -> Selection:
        return Selection.from_roles({"floor": self.keep})


def name_of(spec: str) -> str:
    """The name of a method, or of two that are joined, named by it or as `module:Class`, or `none`.

    Raises OptionError where there is none.
    """
    if spec == NONE:
        return NONE
    valid = list_methods()
    if spec not in valid and ":" not in spec and JOINED not in spec:
        raise OptionError(f"unknown method {shown(spec)}: give some of {', '.join((NONE, *valid))}")
    return JOINED.join(kind.name for kind in method_classes(spec))


def variants(
    names: Sequence[str],
    budgets: Sequence[dict[str, float | int]],
    options: Sequence[str] = (),
) -> list[Variant]:
    """`none` first, whether or not it is named, then every method at every budget.

    Two methods that are joined, as `hivtp+fastv`, share a budget: see `shared`. All are run alike:
    options of a Runtime are `none`'s too, as far as they change what is sent.

    Parameters
    ----------
    names : Sequence[str]
        of methods, or module:Class
    options : Sequence[str]
        KEY=VALUE, each for the methods that have it

    Raises OptionError for an unknown name, an option that no method has, or a value out of range.
    """
    chosen = [name for name in dict.fromkeys(map(name_of, names)) if name != NONE]
    of_none = dict(read_option(NONE, text) for text in options)
    others = [text for text in options if read_option(NONE, text)[0] not in RUNTIME_OPTIONS]
    if others and not chosen:
        raise OptionError(
            f"--prune-opt {others[0]}: {NONE} is unpruned, it has {', '.join(RUNTIME_OPTIONS)} only"
        )
    read = {name: dict(read_option(name, text) for text in options) for name in chosen}
    known = {name: set(options_of(*method_classes(name))) for name in chosen}
    for key in {key for given in read.values() for key in given}:
        if not any(key in known[name] for name in chosen):
            raise OptionError(f"--prune-opt {key}: none of {', '.join(chosen)} has it")
    own = {name: {k: v for k, v in read[name].items() if k in known[name]} for name in chosen}
    if CLIP_TEXT in of_none:
        _leave_to_clip(own)
    return [
        Variant(unpruned({k: of_none[k] for k in of_none if k in RUNTIME_OPTIONS})),
        *(
            Variant(PruningConfig.of(name, **shared(name, budget, own[name])))
            for name in chosen
            for budget in budgets
        ),
    ]


def _leave_to_clip(own: dict[str, dict[str, Any]]) -> None:
    """Take the option that names a CLIP from methods that read no prompt by one.

    Raises OptionError where none does.
    """
    for name, options in own.items():
        others = {key: value for key, value in options.items() if key != CLIP_TEXT}
        if not PruningConfig.of(name, **others).reads_by_clip:
            del options[CLIP_TEXT]
    if not any(CLIP_TEXT in options for options in own.values()):
        raise OptionError(f"--prune-opt {CLIP_TEXT}: none of {', '.join(own)} reads a prompt by it")


def with_tuned(chosen: Sequence[Variant], tuned: PruningConfig | None) -> list[Variant]:
    """What `variants` gave, and behind it what `llava-hvp tune` found, if that is asked for.

    Raises OptionError where the others cut pictures in another way.
    """
    if tuned is None:
        return list(chosen)
    none, *others = chosen
    if not others:
        runtime = {name: tuned.given[name] for name in RUNTIME_OPTIONS if name in tuned.given}
        none = Variant(unpruned(runtime))
    if none.runtime.tiling != tuned.runtime.tiling:
        raise OptionError(
            f"--prune-from: {tuned} was tuned with tiling={tuned.runtime.tiling}: give the others "
            f"--prune-opt tiling={tuned.runtime.tiling} too"
        )
    return [none, *others, Variant(tuned)]


def shared(spec: str, budget: dict[str, float | int], options: Mapping[str, Any]) -> dict[str, Any]:
    """Budget and options for one method, or for both that are joined: together they meet it.

    The budget of two is the average over the language model's layers. Of r_max each gets the square
    root, so that they prune alike: 0.25 is 0.5 at the tower and 0.5 of that inside. An option
    inside_r_max says otherwise; the tower gets the rest. Of num_tokens the tower keeps twice as
    many, and the language model that number on average.

    Raises OptionError for a budget that is given twice, or cannot be shared so.
    """
    twice = [name for name in BUDGET if budget and name in options]
    if twice:
        raise OptionError(f"--prune-opt {twice[0]}: the budget is given twice: leave it out")
    if len(method_classes(spec)) == 1 or not budget:
        return {**budget, **options}
    if "num_tokens" in budget:
        number = int(budget["num_tokens"])
        return {"num_tokens": 2 * number, f"{INSIDE}num_tokens": number, **options}
    total, inner = budget["r_max"], f"{INSIDE}r_max"
    if not 0 < total <= 1:
        return {"r_max": total, **options}  # which says what is wrong with it
    root = round(math.sqrt(total), 6)
    share = options.get(inner, root)
    if inner in options and not (isinstance(share, (int, float)) and total <= share <= 1):
        raise OptionError(
            f"--prune-opt {inner}={share}: of r_max={total} in all, give one from that to 1"
        )
    rest = total / share if inner in options else root
    return {"r_max": rest, inner: share, **options}

"""What is compared: unpruned LLaVA, a method at a budget, and the floor below each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from llava_hvp.checkpoints.geometry import Vision
from llava_hvp.config import read_option, unpruned
from llava_hvp.errors import OptionError, shown
from llava_hvp.methods import NONE, list_methods, method_class
from llava_hvp.methods.base import Method, Needs, Selection, VisionContext, VisionMethod
from llava_hvp.runtime import RUNTIME_OPTIONS, PruningConfig, Runtime, options_of


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
    def method(self) -> VisionMethod | None:
        """The method; None for unpruned LLaVA."""
        return None if self.pruning is None or not self.pruning.prunes else self.pruning.method

    @property
    def runtime(self) -> Runtime:
        """How it is run."""
        return Runtime() if self.pruning is None else self.pruning.runtime

    @property
    def name(self) -> str:
        """The method's name, or none."""
        name = NONE if self.method is None else self.method.name
        return name + ", all attentions" * self.all_attentions

    @property
    def options(self) -> str:
        """The method's options in words, as `r_max=0.5`."""
        return "" if self.pruning is None else str(self.pruning).partition(" ")[2]

    def __str__(self) -> str:
        return f"{self.name} {self.options}".strip()

    def captures(self, vision: Vision) -> bool:
        """Whether it reads anything of the encoder or the prompt, and so has a floor below it."""
        if self.method is None:
            return False
        return self.method.needs(vision.layers, vision.select) != Needs()


PrunedBy = Variant | PruningConfig | VisionMethod | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Floor(VisionMethod):
    """Keeps what another method kept, known beforehand: captures nothing, chooses nothing.

    `random` at the same count on every tile, less its draw: what the model would take had the
    image only the kept tokens to begin with.

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


def name_of(method: str) -> str:
    """The name of a method that is named by it, or as `module:Class`; `none` is one as well.

    Raises OptionError where there is none.
    """
    valid = (NONE, *list_methods())
    if method not in valid and ":" not in method:
        raise OptionError(f"unknown method {shown(method)}: give some of {', '.join(valid)}")
    return NONE if method == NONE else method_class(method).name


def variants(
    names: Sequence[str],
    budgets: Sequence[dict[str, float | int]],
    options: Sequence[str] = (),
) -> list[Variant]:
    """`none` first, whether or not it is named, then every method at every budget.

    All are run alike: options of a Runtime are `none`'s too, as far as they change what is sent.

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
    known = {name: set(options_of(method_class(name))) for name in chosen}
    for key in {key for given in read.values() for key in given}:
        if not any(key in known[name] for name in chosen):
            raise OptionError(f"--prune-opt {key}: none of {', '.join(chosen)} has it")
    return [
        Variant(unpruned({k: of_none[k] for k in of_none if k in RUNTIME_OPTIONS})),
        *(
            Variant(
                PruningConfig.of(
                    name, **budget, **{k: read[name][k] for k in read[name] if k in known[name]}
                )
            )
            for name in chosen
            for budget in budgets
        ),
    ]

"""What a user gives for a method in Python, or a request in JSON: objects, names, options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llava_hvp.errors import OptionError, shown
from llava_hvp.methods.unpruned import Unpruned
from llava_hvp.runtime import CLIP_TEXT, JOINED, RUNTIME_OPTIONS, PruningConfig, Runtime

METHOD = "method"  # the key of a request beside its options


def config_of(
    method: Any, inside: Any = None, runtime: Any = None, options: Mapping[str, Any] | None = None
) -> PruningConfig:
    """What `prune` is given: a method and one inside, as objects or by names with options.

    Raises
    ------
    UnsupportedModelError
        neither a method nor a name of one
    OptionError
        an unknown name, option or value, or options beside an object
    """
    options = dict(options or {})
    if not isinstance(method, str):
        if isinstance(inside, str):
            raise OptionError(
                f"inside={inside!r} beside {shown(method)}: give both methods as objects, or both "
                "by name"
            )
        if options:
            name, value = next(iter(options.items()))
            raise OptionError(
                f"{name}={shown(value)} beside {shown(method)}, which has its options: give the "
                "method by name, as prune(model, 'hivtp', r_max=0.5)"
            )
        return PruningConfig.checked(method, runtime, inside)
    if isinstance(inside, str):
        method = JOINED.join((method, inside))
    elif inside is not None:
        raise OptionError(
            f"{method!r} beside inside={shown(inside)}: give both methods as objects, or both by "
            "name"
        )
    if runtime is None:
        return PruningConfig.of(method, **options)
    if twice := [name for name in RUNTIME_OPTIONS if name in options]:
        raise OptionError(f"{twice[0]}={shown(options[twice[0]])} beside a runtime: give one")
    chosen = PruningConfig.of(method, **options)
    return PruningConfig.checked(chosen.method, runtime, chosen.inside)


def config_for(
    runtime: Runtime, method: Any, inside: Any = None, options: Mapping[str, Any] | None = None
) -> PruningConfig:
    """What a pruned model is given for a block or a call; how it runs stays as it is.

    Parameters
    ----------
    runtime : Runtime
        of the model
    method : Any
        an object or a name as for `config_of`; both methods as a pair; a mapping of the name and
        options, as `{"method": "hivtp", "r_max": 0.25}`; None for unpruned

    Raises LlavaHvpError for what is none of these.
    """
    if isinstance(method, Mapping):
        given = {str(key): _as_option(value) for key, value in method.items()}
        if options or inside is not None or not isinstance(given.get(METHOD), str):
            raise OptionError(
                f"{shown(dict(method))}: give the name and its options, as "
                '{"method": "hivtp", "r_max": 0.25}'
            )
        method, options = given.pop(METHOD), given
    elif isinstance(method, PruningConfig) and inside is None and not options:
        if method.runtime not in (Runtime(), runtime):
            raise OptionError(
                f"{method} was tuned with a running of its own, and a model has one for every "
                "method on it: load the model's with prune(model, load_method(...))"
            )
        return replace(method, runtime=runtime)
    elif isinstance(method, (tuple, list)) and len(method) == 2 and inside is None:
        method, inside = method
    if CLIP_TEXT in (options or {}):
        raise OptionError(
            f"{CLIP_TEXT}={shown((options or {})[CLIP_TEXT])} names the CLIP of a model, the same "
            f"for every method on it: give it to prune(model, method, {CLIP_TEXT}='name or folder')"
        )
    for name in RUNTIME_OPTIONS:
        if name in (options or {}):
            raise OptionError(
                f"{name} says how the model runs, the same for every method on it: give it to "
                f"prune(model, method, runtime=Runtime({name}={(options or {})[name]!r}))"
            )
    if method is None and inside is None and not options:
        return PruningConfig(Unpruned(), runtime)
    return config_of(method, inside, runtime, options)


def _as_option(value: Any) -> Any:
    """JSON has no tuples, and options no lists."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(_as_option(each) for each in value) if is_list else value

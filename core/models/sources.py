"""Build modules from the user's code, timm, torchvision and transformers. Nothing is downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack import usercode
from edgepack.errors import InputError, Unsupported, nearest, require
from edgepack.models import prepare_torchvision

if TYPE_CHECKING:
    from torch import nn


def from_code(source: str, folder: Path, options: Mapping[str, Any]) -> nn.Module:
    """Call (or take) what ``file.py:name`` or ``package.module:name`` names. No other code of the user runs."""
    from torch import nn

    found = usercode.load(source, folder)
    if isinstance(found, nn.Module):
        if options:
            raise InputError(f"{source} is a module, not a callable, so it takes no options")
        return found
    if not callable(found):
        raise InputError(f"{source} is a {type(found).__name__}, neither a callable nor a module")
    return _construct(found, options, f"{source}()")


def from_timm(name: str, folder: Path, options: Mapping[str, Any]) -> nn.Module:
    """``timm.create_model`` without pretrained weights."""
    prepare_torchvision()
    timm: Any = require("timm", "zoo")
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}", _near(name, timm.list_models()))
    return _construct(lambda **kw: timm.create_model(name, pretrained=False, **kw), options, f"timm:{name}")


def from_torchvision(name: str, folder: Path, options: Mapping[str, Any]) -> nn.Module:
    """``torchvision.models.get_model`` without weights; detectors become their raw heads."""
    prepare_torchvision()
    models: Any = require("torchvision.models", "zoo")
    if name not in models.list_models():
        raise InputError(f"torchvision has no model {name!r}", _near(name, models.list_models()))
    detector = name in models.list_models(models.detection)
    nothing = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        nothing["weights_backbone"] = None
    source = f"torchvision:{name}"
    module = _construct(lambda **kw: models.get_model(name, **nothing, **kw), options, source)
    return _raw_heads(module, source) if detector else module


def from_transformers(name: str, folder: Path, options: Mapping[str, Any]) -> nn.Module:
    """A class built from its default configuration changed by ``options``, or a local folder with ``config.json``."""
    prepare_torchvision()
    transformers: Any = require("transformers", "zoo")
    local = folder / name
    if (local / "config.json").is_file():
        return _transformers_folder(transformers, local, options)
    cls = getattr(transformers, name, None) if name.isidentifier() else None
    if getattr(cls, "config_class", None) is None:
        words = [word for word in dir(transformers) if word.startswith(name[:2]) and "For" in word]
        raise InputError(
            f"transformers has no model class {name!r}, and {local} has no config.json", _near(name, words)
        )
    assert cls is not None
    return _construct(lambda **kw: cls(cls.config_class(**kw)), options, f"transformers:{name}")


ZOOS: dict[str, Callable[[str, Path, Mapping[str, Any]], nn.Module]] = {
    "timm": from_timm,
    "torchvision": from_torchvision,
    "transformers": from_transformers,
}


def _transformers_folder(transformers: Any, local: Path, options: Mapping[str, Any]) -> nn.Module:
    try:
        config = transformers.AutoConfig.from_pretrained(
            local, local_files_only=True, trust_remote_code=False, **options
        )
        architecture = (config.architectures or ["AutoModel"])[0]
        cls = getattr(transformers, architecture, None)
        if cls is None:
            raise InputError(f"{local / 'config.json'}: transformers has no class {architecture!r}")
        if not any(local.glob("*.safetensors")):
            return _checked(cls(config) if architecture != "AutoModel" else cls.from_config(config), str(local))
        module, info = cls.from_pretrained(
            local, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"cannot load {local}: {usercode.sentence(error)}") from error
    if info["missing_keys"]:
        raise InputError(f"{local}: its weights lack {', '.join(sorted(info['missing_keys'])[:3])} …")
    return _checked(module, str(local))


def _raw_heads(module: nn.Module, source: str) -> nn.Module:
    from edgepack.models.detection import RawHeads

    if "roi_heads" in dict(module.named_children()):
        raise Unsupported(
            f"{source} is a two-stage detector: its second stage depends on the boxes the first one finds",
            "name a one-stage detector (ssd, ssdlite, retinanet, fcos), or a file.py:callable with the part to deploy",
        )
    return RawHeads(module)


def _construct(build: Callable[..., Any], options: Mapping[str, Any], source: str) -> nn.Module:
    _check_options(build, options, source)
    with usercode.blaming(source):
        return _checked(build(**options), source)


def _check_options(build: Callable[..., Any], options: Mapping[str, Any], source: str) -> None:
    try:
        parameters = inspect.signature(build).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in options:
        if name not in parameters:
            hint = nearest(name, parameters) if parameters else "it takes no options"
            raise InputError(f"{source} has no option {name!r}", hint)


def _checked(built: Any, source: str) -> nn.Module:
    from torch import nn

    if not isinstance(built, nn.Module):
        raise InputError(f"{source} gave a {type(built).__name__}, not a torch.nn.Module")
    return built


def _near(name: str, words: list[str]) -> str | None:
    """The nearest word, or nothing where the list of valid words is too long to read."""
    text = nearest(name, words) if words else ""
    return text if text.startswith("did") or 0 < len(words) <= 12 else None

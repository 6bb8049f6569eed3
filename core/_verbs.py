"""How a command is declared: the options that several share, and the one document that each returns."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edgepack._console import Screen
    from edgepack.pipeline import Options
    from edgepack.recipe import Recipe

app = typer.Typer(
    name="edgepack",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with:  edgepack init --example digits demo  and then  edgepack run demo",
)

Json = dict[str, Any]
ALWAYS = ("as_json", "verbose", "quiet")


@dataclass(frozen=True, kw_only=True)
class Call:
    """The options that several commands share."""

    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Results; default edgepack-out beside it.")] = None
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: export.onnx.name=x.")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False
    force: Annotated[bool, typer.Option("--force", help="Do again (or replace) what is there.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, all else on stderr.")] = False
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="Say more; -vv for everything.")] = 0
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only errors (and the JSON document).")] = False

    @property
    def screen(self) -> Screen:
        from edgepack._console import screen

        return screen(self.as_json, self.quiet)

    def recipe(self, path: Path) -> Recipe:
        from edgepack import recipe

        return recipe.load(path, self.overrides or ())

    def options(self) -> Options:
        from edgepack.pipeline import Options

        return Options(out=self.out, force=self.force, progress=self.screen.progress)


def verb(*shared: str, examples: str) -> Callable[[Callable[..., Json]], Callable[..., Json]]:
    """Register a command that also takes the shared options named; they arrive as its first argument.

    What the command returns is the JSON document of ``--json``.
    """

    def register(function: Callable[..., Json]) -> Callable[..., Json]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        fields = inspect.signature(Call, eval_str=True).parameters
        others = [fields[name] for name in (*shared, *ALWAYS)]

        def command(**values: Any) -> None:
            call = Call(**{item.name: values.pop(item.name) for item in others})
            _log(call.verbose)
            from edgepack._console import stdout_for_people

            try:
                with stdout_for_people(call.as_json):
                    document = function(call, **values)
            finally:
                call.screen.progress.done()
            call.screen.result(document)

        keyword = inspect.Parameter.KEYWORD_ONLY
        signature = inspect.Signature([item.replace(kind=keyword) for item in (*own, *others)])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {item.name: item.annotation for item in (*own, *others)}
        command.__doc__ = function.__doc__
        epilog = "\n\n".join(["Examples:", *examples.splitlines()])
        app.command(function.__name__.rstrip("_"), epilog=epilog)(command)
        return function

    return register


def _log(verbose: int) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)

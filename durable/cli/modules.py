"""`durable modules`: what an app is made of, as a tree: modules, providers, what each needs and where it comes from.

Reads marks and annotations only; nothing is made, opened or connected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from durable.cli.node import json_option
from durable.cli.output import EXIT_HELP, console, show_json
from durable.cli.text import safe

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree


@click.command(epilog=EXIT_HELP)
@click.argument("app", metavar="MODULE:APP")
@json_option
def modules(app: str, as_json: bool) -> None:
    """Show an app's modules and providers, and what each needs.

    MODULE:APP names a module (or a .py file) and the root module class in it; ":APP" may be left out when there is only
    one. Modules that do not fit together are told with what to do; so this is a check, too.

    \b
    Examples:
      durable modules shop.app:AppModule
      durable modules examples/orders_module.py --json
    """
    from durable.cli.target import load_module_app

    described = load_module_app(app).describe()
    if as_json:
        show_json(described)
        return
    console().print(_tree(described))


def _tree(described: list[dict[str, Any]]) -> Tree:
    from rich.tree import Tree

    by_name = {module["name"]: module for module in described}
    root = Tree(_module(described[0]), guide_style="dim")
    _fill(root, described[0], by_name, {described[0]["name"]})
    return root


def _fill(branch: Tree, module: dict[str, Any], by_name: dict[str, Any], shown: set[str]) -> None:
    for name in module["workflows"]:
        branch.add(_line(f"workflow {name}", "green"))
    for name in module["steps"]:
        branch.add(_line(f"step {name}", "yellow"))
    for provider in module["providers"]:
        leaf = branch.add(_provider(provider))
        for need in provider["needs"]:
            leaf.add(_need(module, need))
        for step in provider["steps"]:
            leaf.add(_line(f"step {step}", "yellow"))
    for name in module["imports"]:
        again = name in shown
        leaf = branch.add(_module(by_name[name], again))
        if not again:
            shown.add(name)
            _fill(leaf, by_name[name], by_name, shown)


def _module(module: dict[str, Any], again: bool = False) -> Text:
    text = _line(module["name"], "bold cyan")
    marks = (["global"] if module["global"] else []) + (["shown above"] if again else [])
    return text.append(f"  {', '.join(marks)}" if marks else "", style="dim")


def _provider(provider: dict[str, Any]) -> Text:
    text = _line(provider["token"], "bold")
    if provider["workflow"]:
        text.append(f"  workflow {safe(provider['workflow'])}", style="green")
    details = [] if provider["form"] == "class" else [provider["form"]]
    if provider["existing"]:
        details[-1:] = [f"is {provider['existing']}"]
    if provider["scope"] != "singleton" and not provider["workflow"]:
        details.append(provider["scope"])
    if provider["exported"]:
        details.append("exported")
    return text.append(f"  {safe(', '.join(details))}" if details else "", style="dim")


def _need(module: dict[str, Any], need: dict[str, Any]) -> Text:
    text = _line(f"needs {need['token']}", "")
    later = " when called" if need["lazy"] else ""
    origin = "" if need["from"] == module["name"] else f" from {need['from']}"
    return text.append(safe(later + origin), style="dim")


def _line(text: str, style: str) -> Text:
    from rich.text import Text

    return Text(safe(text), style=style)

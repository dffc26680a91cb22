"""`moe-layer config show | check | schema | reference`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from moe_layer.config.describe import reference
from moe_layer.config.dump import config_hash, to_yaml
from moe_layer.config.load import load_config, load_with_origins
from moe_layer.config.schema import schema_text
from moe_layer.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    """Add the `config` command."""
    parser = subparsers.add_parser("config", help="show, check and document configurations")
    commands = parser.add_subparsers(dest="config_command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="print every value of a configuration with its origin")
    show.add_argument("config", help="a YAML file or the name of a preset")
    show.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as router.top_k=4")
    show.add_argument("--yaml", action="store_true", help="print resolved YAML instead of the table")
    show.set_defaults(handler=show_config)
    check = commands.add_parser("check", help="check files and report every problem")
    check.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML files or names of presets")
    check.set_defaults(handler=check_configs)
    commands.add_parser("schema", help="print the JSON schema").set_defaults(handler=print_schema)
    commands.add_parser("reference", help="print docs/config.md").set_defaults(handler=print_reference)


def show_config(args: argparse.Namespace) -> int:
    """Each value with its origin: default, file:line:column, preset, or override."""
    loaded = load_with_origins(args.config, args.overrides)
    if args.yaml:
        sys.stdout.write(to_yaml(loaded.config))
        return 0
    rows = [(key, _shown(_lookup(loaded.config, key)), origin) for key, origin in loaded.origins.items()]
    wide = [max(len(row[column]) for row in rows) for column in range(2)]
    print(f"# {type(loaded.config).__name__}, hash {config_hash(loaded.config)}")
    for key, value, origin in rows:
        print(f"{key:<{wide[0]}}  {value:<{wide[1]}}  {origin}")
    return 0


def check_configs(args: argparse.Namespace) -> int:
    """One "ok" line per good file; all problems of all bad files in one error."""
    problems: list[str] = []
    for name in args.configs:
        try:
            print(f"ok  {name} ({type(load_config(name)).__name__})")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return 0


def print_schema(_args: argparse.Namespace) -> int:
    """The contents of configs/schema.json."""
    sys.stdout.write(schema_text())
    return 0


def print_reference(_args: argparse.Namespace) -> int:
    """The contents of docs/config.md."""
    sys.stdout.write(reference())
    return 0


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _shown(value: Any) -> str:
    assert not dataclasses.is_dataclass(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(list(value)) if isinstance(value, tuple) else repr(value) if isinstance(value, str) else str(value)

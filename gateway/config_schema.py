"""The JSON schema of the configuration, for editors; ``python -m gateway.config_schema`` writes it.

It says what one key may be. What keys must be to each other, only ``gateway.config`` checks.
"""

import json
import sys
from typing import Any

from drivers.protocols import family_names, load
from gateway.config import Config, options_model

Schema = dict[str, Any]


def make_schema() -> Schema:
    """The schema, with each motor family's ids and options in it."""
    schema = _tidy(Config.model_json_schema())
    _add_families(schema["$defs"]["Motor"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "servo-gateway", **schema}


def schema_text() -> str:
    """The schema as the file holds it."""
    return json.dumps(make_schema(), indent=2, ensure_ascii=False) + "\n"


def _tidy(node: Any) -> Any:
    """Without what says nothing in TOML: null, which it lacks, and titles made of the keys."""
    if isinstance(node, list):
        return [_tidy(item) for item in node if item != {"type": "null"}]
    if not isinstance(node, dict):
        return node
    kept = {
        key: _tidy(value)
        for key, value in node.items()
        if not (key == "title" and isinstance(value, str)) and not (key == "default" and value is None)
    }
    if len(kept.get("anyOf", ())) == 1:
        kept |= kept.pop("anyOf")[0]
    return kept


def _add_families(motor: Schema) -> None:
    motor["properties"]["protocol"]["enum"] = list(family_names())
    motor["allOf"] = []
    for name in family_names():
        family = load(name)
        options = _options(family.Options, name) if family.Options else {}
        motor["properties"] |= {key: {} for key in options}
        ids = {"minimum": family.bus_ids[0], "maximum": family.bus_ids[-1]}
        motor["allOf"].append(
            {
                "if": {"properties": {"protocol": {"const": name}}, "required": ["protocol"]},
                "then": {"properties": {"id": ids, **options}},
            }
        )


def _options(options: type, family: str) -> Schema:
    schema: Schema = _tidy(options_model(options).model_json_schema())["properties"]
    about = " ".join((options.__doc__ or "").replace("`", "").split())
    return {key: {"description": f"{family}: {about}", **option} for key, option in schema.items()}


if __name__ == "__main__":
    sys.stdout.write(schema_text())

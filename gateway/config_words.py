"""pydantic's errors in plain words: what a value must be, which key is missing, which was meant."""

from collections.abc import Callable, Iterator, Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gateway.config_faults import Finding, Raw, instead_of, value_at
from gateway.toml_lines import Steps

NAME = "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"  # part of a topic's name (at most 249), of a path, of a command line
VARIABLE = "^[A-Za-z_][A-Za-z0-9_]*$"

_WORDS = {
    NAME: 'must be 1 to 100 letters, digits, "_", "-" or ".", and begin with a letter, a digit or "_"',
    VARIABLE: "must be the name of an environment variable: letters, digits and _",
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be more than {gt:.10g}",
    "greater_than_equal": "must be at least {ge:.10g}",
    "int_type": "must be a whole number",
    "less_than_equal": "must be at most {le:.10g}",
    "string_too_short": "must not be empty",
    "string_type": "must be text, in quotes",
    "too_long": "must have {max_length} items",
    "too_short": "must not be empty",
    "union_tag_invalid": 'must be "can" or "serial"',
    "union_tag_not_found": 'is missing: must be "can" or "serial"',
    "value_error": "{error}",
}


def explain(
    error: ValidationError, raw: Raw, known: Callable[[Steps, Raw], Mapping[str, str]], prefix: Steps = ()
) -> Iterator[Finding]:
    """The findings in ``error``, which comes from the part of ``raw`` at ``prefix``.

    ``known`` tells of the table at a place {key: what it is}.
    """
    for detail in error.errors(include_url=False, include_input=False):
        kind, steps = detail["type"], (*prefix, *detail["loc"])
        if steps[0] == "bus" or steps[2:3] == ("options",):  # the union's tag, a motor's options: not in the file
            steps = steps[:2] + steps[3:]
        if kind.startswith("union_tag"):
            steps = (*steps, "type")
        if kind == "too_short" and value_at(raw, steps):
            continue  # its items are at fault, and it is called short for want of good ones
        yield Finding(steps, _sentence(detail, steps, known(steps[:-1], raw)), secret=kind == "extra_forbidden")


def _sentence(detail: ErrorDetails, steps: Steps, known: Mapping[str, str]) -> str:
    kind, key, context = detail["type"], str(steps[-1]), detail.get("ctx", {})
    match kind:
        case "missing":
            about = known.get(key, "")
            return f"is missing: {about[:1].lower()}{about[1:]}".rstrip(".: ")
        case "extra_forbidden" if key in ("sasl_password", "secret"):
            return f"must not be in a file that is copied and shown around; use {key}_env or {key}_file"
        case "extra_forbidden":
            return f"unknown; {instead_of(key, known)}"
        case "literal_error":
            return f"must be {context['expected']}".replace("'", '"')
        case "tuple_type" if len(steps) == 1 or steps == ("commands", "key"):
            return f"must be written [[{'.'.join(map(str, steps))}]], once for each {key}"
        case "tuple_type":
            return "must be a list: [..., ...]"
        case "model_type" | "model_attributes_type":
            if len(steps) == 1:
                return f"must be a table: [{key}]"
            return f"must be a table: [[{'.'.join(step for step in steps if isinstance(step, str))}]]"
        case _:
            return _WORDS.get(context.get("pattern", kind), detail["msg"]).format_map(context)

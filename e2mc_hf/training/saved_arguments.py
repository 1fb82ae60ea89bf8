"""Training arguments as JSON that may be shown to anyone, in place of transformers' pickle."""

import dataclasses
import enum
import json
import re
from pathlib import Path
from typing import Any

NAME = "training_args.json"
# Parts of the name of anything that is kept to oneself, and of what is only if it is no number: `reg_tokens` is 4.
_SECRET_NAME = re.compile(r"password|passwd|secret|credential|api_?key|access_?key|hf_token", re.IGNORECASE)
_SECRET_NAME_OF_TEXT = re.compile(r"token|key", re.IGNORECASE)
# Where a run reports to, and under whose name.
_TRACKING = re.compile(r"report_to|run_name|project|trackio_.*|hub_.*|push_to_hub")
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?:[^/?#\s]*@)?(?P<place>[^?#\s]*)\S*", re.IGNORECASE)
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


def save_arguments(args: Any, folder: Path | str) -> None:
    """Write training arguments, without secrets and trackers, for the reader of a run; nothing reads them back."""
    named = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
    shown = {name: value for name, value in named.items() if not _TRACKING.fullmatch(name)}
    (Path(folder) / NAME).write_text(json.dumps(without_secrets(shown), indent=1), encoding="utf-8")


def without_secrets(value: Any) -> Any:
    """A value as JSON has it, without what must not be shown.

    Left out are entries whose name speaks of a token, key, password or secret, user, password, query and fragment of a
    URL, and tokens of the Hub.
    """
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, dict):
        return {str(key): without_secrets(part) for key, part in value.items() if not _is_secret(str(key), part)}
    if isinstance(value, (list, tuple, set)):
        return [without_secrets(part) for part in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return without_secrets(vars(value))
    return _TOKEN.sub("hf_...", _URL.sub(r"\g<scheme>\g<place>", str(value)))


def _is_secret(name: str, value: Any) -> bool:
    is_number = value is None or isinstance(value, (bool, int, float))
    return bool(_SECRET_NAME.search(name) or (not is_number and _SECRET_NAME_OF_TEXT.search(name)))

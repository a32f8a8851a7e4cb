"""What the brain needs to know of a request body, without building the body.

Decodes only the wanted members; prompts stay raw bytes. Never raises on input: a body that cannot be understood is a
`BadRequest` value. What the router does not depend on (a wrong `temperature`) is left for the engine to judge.
"""

from __future__ import annotations

import re
from operator import attrgetter

import msgspec
from msgspec import UNSET, Raw, UnsetType

from picker.openai import errors
from picker.openai.estimate import MEDIA_TOKENS, inline_media, is_empty_list, token_ids
from picker.openai.fleet import EXTRA_ARGS_FIELDS, FLEET_BODY_FIELDS, NVEXT_FIELDS, names_fleet_address
from picker.openai.multipart import parse_form
from picker.openai.routes import Route, RouteKind, match_suffix
from picker.openai.wanted import ANY_PROMPT, NEEDS, Needs, Sampling, StreamOptions, Wanted

BYTES_PER_TOKEN = 4
# Between compressed speech (about 160 bytes per encoder token) and 16 kHz PCM (640).
AUDIO_BYTES_PER_TOKEN = 320
MAX_COUNT = 1_000_000_000
_MAX_HINT_CHARS = 512


class BadRequest(msgspec.Struct, frozen=True):
    """A body we refuse: an English message, the member at fault if one is, and a string code."""

    message: str
    param: str | None = None
    code: str = "bad_request"

    def error(self) -> errors.ApiError:
        """The 400 answer for it."""
        return errors.bad_request(self.message, param=self.param, code=self.code)


class ParsedBody(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of one request body. Token counts are in tokens, `prompt_bytes` in bytes of JSON text.

    `prompt` is a view of the prompt member (messages, prompt, input, ...) inside the body, not a copy. `prompt_ids` is
    the number of token ids when the prompt is given as ids. `fleet_fields` are dotted names for
    `rewrite.strip_fleet_fields`. `model_spans` are the byte ranges of the model in a multipart form.
    """

    kind: RouteKind
    model: str | None = None
    stream: bool = False
    max_tokens: int | None = None
    n: int = 1
    prompt: Raw | None = None
    prompt_bytes: int = 0
    prompt_ids: int | None = None
    prompt_tokens_estimate: int = 0
    media_items: int = 0
    include_usage: bool = False
    previous_response_id: str | None = None
    session_id: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    cache_salt: str | None = None
    fleet_fields: tuple[str, ...] = ()
    is_json: bool = False
    model_spans: tuple[tuple[int, int], ...] = ()

    @property
    def session_hint(self) -> str | None:
        """What keeps a conversation on one endpoint, the most specific member first."""
        return self.session_id or self.prompt_cache_key or self.user


_FORM_KINDS = frozenset((RouteKind.TRANSCRIPTIONS, RouteKind.TRANSLATIONS))
_BODILESS_KINDS = frozenset((RouteKind.MODELS, RouteKind.RESPONSE_STATE))

_DECODE = msgspec.json.Decoder(Wanted).decode
_DECODE_SAMPLING = msgspec.json.Decoder(Sampling).decode
_DECODE_OPTIONS = msgspec.json.Decoder(StreamOptions).decode
_DECODE_TEXT = msgspec.json.Decoder(str).decode
_DECODE_OBJECT = msgspec.json.Decoder(dict[str, Raw]).decode
_BAD_INPUT = (msgspec.MsgspecError, ValueError, RecursionError)

# One C call and one comparison tell that a request has none of these, which is nearly every request.
_FLEET_MEMBERS = attrgetter(*FLEET_BODY_FIELDS, "nvext", "vllm_xargs", "request_id")
_NO_FLEET = (UNSET,) * (len(FLEET_BODY_FIELDS) + 3)
_HINT_MEMBERS = attrgetter("previous_response_id", "session_id", "prompt_cache_key", "user", "cache_salt")
_UNSET_HINTS = (UNSET,) * 5
_NO_HINTS: tuple[str | None, ...] = (None,) * 5

_INTEGER = re.compile(rb"\d{1,18}\Z")
_AT_MEMBER = re.compile(r" - at `\$\.?([^`]*)`\Z")


def parse_body(
    route: Route | str,
    body: bytes,
    content_type: str | None = None,
    *,
    strict: bool = True,
    require_model: bool = False,
) -> ParsedBody | BadRequest:
    """Read `body` for `route` (a `Route`, or a path for `match_suffix`).

    `strict` refuses a body without the prompt members its route needs; `require_model` one without a model. A
    passthrough route is read when it happens to be JSON and never refused. Never raises on any input.
    """
    found = match_suffix(route) if isinstance(route, str) else route
    kind = found.kind
    if kind in _BODILESS_KINDS:
        return ParsedBody(kind=kind)
    if content_type is not None and content_type[:10].lower() == "multipart/":
        return _parse_form(kind, body, content_type, require_model=require_model)
    if kind is RouteKind.PASSTHROUGH:
        parsed = _parse_json(kind, body, strict=False)
        return parsed if isinstance(parsed, ParsedBody) else ParsedBody(kind=kind)
    if kind in _FORM_KINDS:
        return BadRequest("this route takes a multipart/form-data body", code="bad_request")
    parsed = _parse_json(kind, body, strict=strict)
    if require_model and isinstance(parsed, ParsedBody) and parsed.model is None:
        return _missing("model")
    return parsed


def _parse_form(kind: RouteKind, body: bytes, content_type: str, *, require_model: bool) -> ParsedBody | BadRequest:
    form = parse_form(body, content_type)
    if form is None:
        if kind is RouteKind.PASSTHROUGH:
            return ParsedBody(kind=kind)
        return BadRequest("the multipart body does not follow its content-type")
    if require_model and form.model is None and kind is not RouteKind.PASSTHROUGH:
        return _missing("model")
    return ParsedBody(
        kind=kind,
        model=form.model,
        stream=form.stream,
        prompt_bytes=form.file_bytes,
        prompt_tokens_estimate=-(-form.file_bytes // AUDIO_BYTES_PER_TOKEN),
        media_items=1 if form.file_bytes else 0,
        model_spans=form.model_spans,
    )


def _parse_json(kind: RouteKind, body: bytes, *, strict: bool) -> ParsedBody | BadRequest:
    try:
        wanted = _DECODE(body)
    except msgspec.ValidationError as error:
        return _wrong_type(str(error))
    except RecursionError:
        return BadRequest("the body is nested too deeply", code="invalid_json")
    except (msgspec.DecodeError, ValueError) as error:
        return _not_json(body, str(error))
    needs = NEEDS.get(kind, ANY_PROMPT)
    prompt = _first_present(wanted, needs.prompt)
    if strict and kind in NEEDS:
        refusal = _refuse_prompt(wanted, needs, prompt)
        if refusal is not None:
            return refusal
    return _facts(kind, wanted, body, prompt)


def _facts(kind: RouteKind, wanted: Wanted, body: bytes, prompt: Raw | None) -> ParsedBody:
    max_tokens = _max_tokens(wanted)
    count = wanted.n
    fleet = _fleet(wanted) if _FLEET_MEMBERS(wanted) != _NO_FLEET else []
    if wanted.sampling_params is not UNSET:
        sampled_max, sampled_n, sampled_fleet = _sampling(wanted.sampling_params)
        max_tokens = sampled_max if max_tokens is None else max_tokens
        count = sampled_n if count is UNSET else count
        fleet += sampled_fleet
    hints = _NO_HINTS
    if _HINT_MEMBERS(wanted) != _UNSET_HINTS:
        hints = tuple(_text(raw) for raw in _HINT_MEMBERS(wanted))
    prompt_bytes, ids, media_items, tokens = _size(kind, wanted, body, prompt)
    return ParsedBody(
        kind=kind,
        model=wanted.model or None,
        stream=wanted.stream is True,
        max_tokens=max_tokens,
        n=max(1, _integer(count) or 1),
        prompt=prompt,
        prompt_bytes=prompt_bytes,
        prompt_ids=ids,
        prompt_tokens_estimate=tokens,
        media_items=media_items,
        include_usage=wanted.stream_options is not UNSET and _include_usage(wanted.stream_options),
        previous_response_id=hints[0],
        session_id=hints[1],
        prompt_cache_key=hints[2],
        user=hints[3],
        cache_salt=hints[4],
        fleet_fields=tuple(fleet),
        is_json=True,
    )


def _fleet(wanted: Wanted) -> list[str]:
    """Dotted names of the members that clients must not set, except those in `sampling_params`."""
    fleet = [name for name in FLEET_BODY_FIELDS if getattr(wanted, name) is not UNSET]
    if wanted.nvext is not UNSET:
        fleet += _nested("nvext", wanted.nvext, NVEXT_FIELDS)
    if wanted.vllm_xargs is not UNSET:
        fleet += _nested("vllm_xargs", wanted.vllm_xargs, EXTRA_ARGS_FIELDS)
    if wanted.request_id is not UNSET and names_fleet_address(_text(wanted.request_id, limit=None) or ""):
        fleet.append("request_id")
    return fleet


def _size(kind: RouteKind, wanted: Wanted, body: bytes, prompt: Raw | None) -> tuple[int, int | None, int, int]:
    """(bytes of the prompt members, number of token ids if they are ids, inline media items, estimated tokens)."""
    if prompt is None:
        return len(body), None, 0, -(-len(body) // BYTES_PER_TOKEN)
    ids = token_ids(prompt)
    prompt_bytes = len(prompt)
    if ids is not None:
        return prompt_bytes, ids, 0, ids
    needs = NEEDS.get(kind, ANY_PROMPT)
    for name in needs.extras:
        extra: Raw | UnsetType = getattr(wanted, name)
        if extra is not UNSET:
            prompt_bytes += len(extra)
    media_bytes, media_items = inline_media(body)
    text_bytes = max(0, prompt_bytes - media_bytes)
    return prompt_bytes, None, media_items, -(-text_bytes // BYTES_PER_TOKEN) + media_items * MEDIA_TOKENS


def _first_present(wanted: Wanted, names: tuple[str, ...]) -> Raw | None:
    for name in names:
        raw: Raw | UnsetType = getattr(wanted, name)
        if raw is not UNSET and not _is_null(raw):
            return raw
    return None


def _refuse_prompt(wanted: Wanted, needs: Needs, prompt: Raw | None) -> BadRequest | None:
    for name in needs.all_of:
        if _first_present(wanted, (name,)) is None:
            return _missing(name)
    if prompt is None:
        return _missing(needs.prompt[0], others=needs.prompt[1:])
    if needs.list_only:
        name = needs.prompt[0]
        if memoryview(prompt)[0] != 0x5B:
            return BadRequest(f"`{name}` must be a list", param=name, code="invalid_type")
        if is_empty_list(prompt):
            return BadRequest(f"`{name}` must not be empty", param=name, code="invalid_value")
    return None


def _max_tokens(wanted: Wanted) -> int | None:
    for raw in (wanted.max_completion_tokens, wanted.max_tokens, wanted.max_output_tokens):
        if raw is not UNSET:
            limit = _integer(raw)
            if limit is not None:
                return limit
    return None


def _sampling(raw: Raw) -> tuple[int | None, Raw | UnsetType, list[str]]:
    """(max tokens, n, fleet fields) of a native `sampling_params` object."""
    try:
        sampling = _DECODE_SAMPLING(raw)
    except _BAD_INPUT:
        return None, UNSET, []
    limit = _integer(sampling.max_tokens)
    if limit is None:
        limit = _integer(sampling.max_new_tokens)
    fleet: list[str] = []
    if sampling.extra_args is not UNSET:
        fleet = _nested("sampling_params.extra_args", sampling.extra_args, EXTRA_ARGS_FIELDS)
    return limit, sampling.n, fleet


def _nested(parent: str, raw: Raw, names: tuple[str, ...]) -> list[str]:
    """Dotted names of those `names` which the object `raw` has; all of them when it cannot be told."""
    if _is_null(raw):
        return []
    try:
        found = _DECODE_OBJECT(raw)
    except msgspec.ValidationError:
        return []
    except _BAD_INPUT:
        return [f"{parent}.{name}" for name in names]
    return [f"{parent}.{name}" for name in names if name in found]


def _include_usage(raw: Raw) -> bool:
    try:
        return _DECODE_OPTIONS(raw).include_usage is True
    except _BAD_INPUT:
        return False


def _integer(raw: Raw | UnsetType) -> int | None:
    if raw is UNSET:
        return None
    text = bytes(raw) if len(raw) <= 18 else b""
    return min(int(text), MAX_COUNT) if _INTEGER.match(text) else None


def _text(raw: Raw | UnsetType, *, limit: int | None = _MAX_HINT_CHARS) -> str | None:
    """A non-empty string member; None for anything else, and for one longer than `limit` characters."""
    if raw is UNSET:
        return None
    try:
        text = _DECODE_TEXT(raw)
    except _BAD_INPUT:
        return None
    return text if text and (limit is None or len(text) <= limit) else None


def _is_null(raw: Raw) -> bool:
    return len(raw) == 4 and memoryview(raw)[0] == 0x6E


def _missing(name: str, *, others: tuple[str, ...] = ()) -> BadRequest:
    known = " or ".join(f"`{choice}`" for choice in (name, *others))
    return BadRequest(f"{known} is required", param=name, code="missing_required_parameter")


def _wrong_type(message: str) -> BadRequest:
    where = _AT_MEMBER.search(message)
    if where is None:
        return BadRequest("the body must be a JSON object", code="invalid_json")
    name = where.group(1)
    kind = "a string" if name == "model" else "true or false"
    return BadRequest(f"`{name}` must be {kind}", param=name, code="invalid_type")


def _not_json(body: bytes, message: str) -> BadRequest:
    if not body or body.isspace():
        return BadRequest("the body is empty; a JSON object is expected", code="invalid_json")
    # The decoder says "truncated" for half of a surrogate pair too.
    reason = (
        "it ends early, or has a broken escape" if "truncated" in message else message.partition(": ")[2] or message
    )
    return BadRequest(f"the body is not valid JSON: {reason}", code="invalid_json")

"""A model's own tokenizer on this machine: the directory it is in, loaded once, used from threads.

Needs the packages of the extra `tokenizer`; without them, or without the files, loading says so and nothing else
changes. No hub is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from xxhash import xxh3_64_intdigest

from picker.signals.tokens.cache import IdCache
from picker.signals.tokens.content import MAX_TEXT_BYTES, Chat, Text
from picker.signals.tokens.encoder import Encoder

if TYPE_CHECKING:
    from picker.signals.tokens.template import ChatTemplate

_SPECIAL_SUFFIX = "_token"


class LoadProblem(msgspec.Struct, frozen=True):
    """Why a tokenizer cannot be used, in English, for the log and the operator."""

    message: str


class _AddedToken(msgspec.Struct):
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_AddedToken] = []


class LocalTokenizer:
    """The tokenizer and the chat template of one model. `encode` may be called from any thread."""

    __slots__ = ("_encoder", "_template")

    def __init__(self, encoder: Encoder, template: ChatTemplate | None) -> None:
        self._encoder = encoder
        self._template = template

    def __repr__(self) -> str:
        return f"<LocalTokenizer {self._encoder!r} template={self._template is not None}>"

    @property
    def splits(self) -> bool:
        """Whether messages are cached one by one."""
        return self._encoder.splits

    def text(self, prompt: Text | Chat) -> str | None:
        """What the engine tokenises for this prompt; None when that is not known. Never raises."""
        if not prompt.exact:
            return None
        if isinstance(prompt, Text):
            return prompt.text
        if self._template is None:
            return None
        try:
            return self._template.render(prompt)
        except Exception:
            # `Unrenderable`, which cannot be imported without jinja2; anything else is as good as that.
            return None

    def encode(self, prompt: Text | Chat) -> bytes | None:
        """The ids the engine makes of this prompt (u32, little-endian); None when they are not known. Never raises.

        Takes as long as it takes: milliseconds for each 10 KB not seen before.
        """
        text = self.text(prompt)
        if text is None or len(text) > MAX_TEXT_BYTES:
            return None
        try:
            return self._encoder.encode(text, add_special_tokens=prompt.add_special_tokens)
        except Exception:
            # The tokenizer is foreign code; its complaints may quote the prompt.
            return None


def load_tokenizers(paths: Mapping[str, Path], cache_bytes: int) -> dict[str, LocalTokenizer | LoadProblem]:
    """By model name, the tokenizer in its directory. All share one cache; a directory named twice is loaded once.

    Reads files and takes about 0.2 s for each: not on an event loop.
    """
    cache = IdCache(cache_bytes)
    by_path = {path: load_tokenizer(path, cache) for path in set(paths.values())}
    return {model: by_path[path] for model, path in paths.items()}


def load_tokenizer(directory: Path, cache: IdCache) -> LocalTokenizer | LoadProblem:
    """The tokenizer of a directory with `tokenizer.json` and, for chats, `chat_template.jinja` or the template in
    `tokenizer_config.json`.
    """
    try:
        import tokenizers

        from picker.signals.tokens.template import ChatTemplate
    except ImportError as error:
        return LoadProblem(f"the package {error.name!r} is missing: pip install 'waypost[tokenizer]'")
    path = directory / "tokenizer.json"
    try:
        raw = path.read_bytes()
        added = msgspec.json.decode(raw, type=_TokenizerFile).added_tokens
        tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except Exception as error:
        # The package raises plain Exception for files it does not like.
        return LoadProblem(f"{path}: {error}")
    source, special = _template_of(directory)
    template = None
    if source:
        try:
            template = ChatTemplate(source, special)
        except Exception as error:
            return LoadProblem(f"the chat template in {directory}: {error}")
    try:
        encoder = Encoder(tokenizer, _split_tokens(added, source), cache, seed=xxh3_64_intdigest(raw))
    except Exception as error:
        return LoadProblem(f"{path} cannot tokenise plain text: {error}")
    return LocalTokenizer(encoder, template)


def _split_tokens(added: Iterable[_AddedToken], template: str) -> list[str]:
    """The added tokens a template puts between messages, as far as they split a text whatever is around them."""
    texts = [token.content for token in added]
    plain = (t.content for t in added if not (t.single_word or t.lstrip or t.rstrip or t.normalized))
    return [text for text in plain if text and text in template and sum(text in other for other in texts) == 1]


def _template_of(directory: Path) -> tuple[str, dict[str, Any]]:
    """The source of the chat template, empty when there is none, and the special tokens it may refer to."""
    config = _json_object(directory / "tokenizer_config.json")
    special = {**_special_tokens(_json_object(directory / "special_tokens_map.json")), **_special_tokens(config)}
    try:
        return (directory / "chat_template.jinja").read_text("utf-8"), special
    except (OSError, ValueError):
        return _named_template(config.get("chat_template")), special


def _named_template(template: object) -> str:
    """Some configurations have several templates by name."""
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Members such as `bos_token`, whose value is a text or an object with one."""
    out: dict[str, str] = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith(_SPECIAL_SUFFIX) and isinstance(text, str):
            out[name] = text
    return out


def _json_object(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return {}

"""One small model for all tests of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from picker.signals.tokens.cache import IdCache
from picker.signals.tokens.local import LocalTokenizer, load_tokenizer
from tests.unit.signals.tokens import rig


@pytest.fixture(scope="session")
def plain() -> tokenizers.Tokenizer:
    """The package's own tokenizer: the reference."""
    return rig.byte_level()


@pytest.fixture(scope="session")
def model_dir(plain: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rig.save(tmp_path_factory.mktemp("model"), plain)


@pytest.fixture
def local(model_dir: Path) -> LocalTokenizer:
    loaded = load_tokenizer(model_dir, IdCache(1 << 22))
    assert isinstance(loaded, LocalTokenizer)
    return loaded

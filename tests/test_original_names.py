"""The calls of the original system, as they were written there, on the embedded models."""

from truthgpt_nb.text import TextGenerator


def test_text_generator(tmp_path):
    generator = TextGenerator(model="tiny-english", tokenizer=None, use_cache=True, cache_dir=str(tmp_path / "cache"))
    text = generator.generate("Once upon a time", max_new_tokens=8)
    assert isinstance(text, str) and text
    assert generator.generate("Once upon a time", max_new_tokens=8) == text
    assert generator.stats().hits_memory == 1
    generator.cache.close()

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class DataConfig:
    """Where tokens come from."""

    train: list[str] = field(default_factory=list)  # files, folders, globs (.txt, .py, .jsonl, ...); []: the embedded corpus
    val: list[str] = field(default_factory=list)  # the same for validation; []: every 20th document of train
    tokenizer: str = "bytes"  # "bytes", a tiktoken name ("gpt2", "o200k_base"), or a rank file (.tiktoken, tokenizer.model)
    text_key: str = "text"  # the field of a JSONL line that holds the text
    cache_dir: str = "data_cache"  # tokenized shards are kept here
    workers: int = 0  # processes that tokenize; 0: one per core

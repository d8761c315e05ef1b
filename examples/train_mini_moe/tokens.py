"""From documents to sequences: the tokenizer, and the order in which its tokens are seen."""

from __future__ import annotations

from pathlib import Path

import torch
from corpus import Corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|endoftext|>"
CHAT_TEMPLATE = """\
{% for m in messages %}{% if m['role']=='user' %}Question: {{ m['content'] }}
{% elif m['role']=='assistant' %}Answer: {{ m['content'] }}
{% else %}{{ m['content'] }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"""


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training documents; END begins the vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    bpe.train_from_iterator(corpus.epoch(seed=0), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class Sequences:
    """Training sequences by position: epoch after epoch of shuffled documents, each begun by END, their rows shuffled.

    In the documents' order a long file would fill whole batches: of Python's sources the longest has 55,000 tokens.
    What position `at` gives depends on the corpus, the seed and `at` alone, so a run that is resumed sees what it would
    have seen.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> None:
        self._corpus, self._tokenizer, self._length, self._seed = corpus, tokenizer, length, seed
        self._epoch = -1
        self._first = 0  # position of the epoch's first sequence
        self._rows = torch.empty(0, length, dtype=torch.int32)

    @property
    def repeats(self) -> dict[str, int]:
        """The corpus's: which sequences there are depends on them."""
        return self._corpus.repeats

    def batch(self, at: int, count: int) -> Tensor:
        """int64 [count, length]: sequences at .. at + count."""
        return torch.stack([self._row(at + offset) for offset in range(count)]).long()

    def _row(self, at: int) -> Tensor:
        if at < self._first:
            self._epoch, self._first, self._rows = -1, 0, self._rows[:0]
        while at - self._first >= len(self._rows):
            self._first += len(self._rows)
            self._epoch += 1
            self._rows = self._tokenize(self._seed + self._epoch)
        return self._rows[at - self._first]

    def _tokenize(self, seed: int) -> Tensor:
        encoded = self._tokenizer([END + text for text in self._corpus.epoch(seed)])["input_ids"]
        flat = torch.tensor([token for document in encoded for token in document], dtype=torch.int32)
        rows = flat[: len(flat) // self._length * self._length].view(-1, self._length)
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that was made before, with its chat template. Raises FileNotFoundError."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json: give a checkpoint in hub layout")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def windows(text_ids: Tensor, length: int) -> list[Tensor]:
    """Token ids [n] cut into windows [1, at most length] of at least two tokens."""
    return [piece[None] for piece in text_ids.split(length) if len(piece) > 1]

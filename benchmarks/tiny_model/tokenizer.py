"""The tokenizer: byte-level BPE of 1,024 tokens, digits one by one, `<bos>` put in front."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vllm_sparq.benchmarks.tasks import generated as tasks

VOCABULARY = 1024
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
SPECIAL = (PAD, BOS, EOS)  # ids 0, 1, 2


def generated_text(rng: random.Random, n_sentences: int) -> str:
    """Sentences like those of the tasks, so that their words do not fall apart into bytes."""
    lines = []
    for _ in range(n_sentences):
        lines.append(tasks.sentence(rng))
        lines.append(" ".join(tasks.passage_sentence(rng, held_out=False)))
        lines.append(tasks.fact(tasks.new_word(rng, held_out=False), tasks.new_number(rng, held_out=False)))
    return "\n".join(lines)


def train_tokenizer(documents: Sequence[str], *, seed: int) -> Tokenizer:
    """BPE trained on the documents and on about a tenth as much generated text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    n_sentences = sum(map(len, documents)) // 10 // 150
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*documents, generated_text(random.Random(seed), n_sentences)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_positions: int) -> None:
    """Write the two files that `AutoTokenizer` and vLLM read."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

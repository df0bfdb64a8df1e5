"""The bundled weights answer, and the parts of their training do what they say. On the CPU, in seconds."""

import itertools
import json
import random

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402

from vllm_sparq.benchmarks.tasks import generated as tasks  # noqa: E402
from vllm_sparq.benchmarks.tiny_model import WEIGHTS, corpus, rows, score, start, train  # noqa: E402
from vllm_sparq.benchmarks.tiny_model.model import Config, Model  # noqa: E402


@pytest.fixture(scope="module")
def bundled():
    """Model and tokenizer of the bundled weights."""
    return score.load(WEIGHTS, torch.float32)


@pytest.fixture(scope="module")
def maker(bundled):
    """Draws training rows; generated sentences stand in for the corpus."""
    tokenizer = bundled[1].backend_tokenizer
    text = " ".join(tasks.sentence(random.Random(i)) for i in range(400))
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint16)
    return rows.RowMaker(tokenizer, ids, n_generated_sentences=400)


def test_the_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in WEIGHTS.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert sum(files.values()) < 10_000_000


def test_the_configuration_is_the_one_trained(bundled):
    settings = json.loads((WEIGHTS / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert {name: settings[name] for name in vars(Config())} == vars(Config())
    assert 3.5e6 < sum(p.numel() for p in bundled[0].parameters()) < 4.1e6


def test_the_tokenizer_adds_bos_and_splits_digits(bundled):
    tokenizer = bundled[1]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("is 4821").input_ids)
    assert tokens == ["<bos>", "is", "Ġ", "4", "8", "2", "1"]
    text = "Any text: tabs\t, naïve, 你好, \n\n  indented."
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("task", tasks.TASKS)
def test_prompt_and_answer_tokenise_into_their_tokens(bundled, task):
    tokenizer = bundled[1]
    for seed in range(5):
        example = tasks.make_example(
            task, n_tokens=400, count_tokens=lambda text: len(tokenizer(text).input_ids), seed=seed
        )
        whole = tokenizer(example.prompt + example.answer).input_ids
        answer = tokenizer(example.answer, add_special_tokens=False).input_ids
        assert whole == tokenizer(example.prompt).input_ids + answer


@pytest.mark.parametrize(
    ("task", "n_tokens", "least"), [("needle", 512, 0.9), ("recall", 512, 0.7), ("repetition", 384, 0.7)]
)
def test_the_bundled_model_retrieves(bundled, task, n_tokens, least):
    scores = score.score_task(*bundled, task, n=6, n_tokens=n_tokens, seed=0)
    assert sum(scores) / len(scores) >= least


def test_the_training_model_computes_what_transformers_does(bundled):
    model, tokenizer = bundled
    ours = Model(Config(), {name: p.detach() for name, p in model.named_parameters()})
    ids = torch.tensor([tokenizer(tasks.sentence(random.Random(0))).input_ids])
    with torch.no_grad():
        got = ours.logits(ids, torch.arange(ids.shape[1])[None], torch.ones_like(ids, dtype=torch.bool))
        expected = model(ids).logits[0]
    # Ours multiplies in bfloat16, eight bits of mantissa.
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_the_structured_start_recalls_before_any_training(maker):
    model = Model(Config(), start.structured_start(Config(), seed=0))
    batch = maker.batch(
        random.Random(0), n_rows=4, n_tokens=128, mixture={"facts": 1.0}, max_positions=Config().max_position_embeddings
    )
    with torch.no_grad():
        _, _, right = train.losses(model, batch)
    assert right > 0.8


@pytest.mark.parametrize("kind", ["facts", "copy", "map", "lm"])
@pytest.mark.parametrize("n_tokens", [300, 700])
def test_rows_are_full_and_their_loss_lies_on_known_tokens(maker, kind, n_tokens):
    n_known = 0
    for seed in range(20):
        row = maker.kinds[kind](random.Random(seed), n_tokens)
        assert len(row.ids) == len(row.weights) >= n_tokens
        assert set(row.weights) <= {0.0, rows.TEXT_WEIGHT, 1.0}
        n_known += 1.0 in row.weights[:n_tokens]
    # Lengths of words are drawn, so now and then a first appearance leaves no room for a second.
    assert n_known == 0 if kind == "lm" else n_known >= 18


def test_training_rows_and_tasks_share_no_names(maker):
    batch = maker.batch(random.Random(0), n_rows=8, n_tokens=256, mixture={"facts": 1.0}, max_positions=4096)
    for ids in batch.ids.tolist():
        words = maker.tokenizer.decode(ids).split("The key of ")
        names = [word.split()[0] for word in words[1:] if " is" in word]
        assert names
        assert not any(tasks.is_held_out(name) for name in names)


def test_positions_jump_ahead_and_stay_in_range():
    for seed in range(50):
        positions = rows.jumping_positions(random.Random(seed), 64, 4096)
        assert len(positions) == 64
        assert positions[0] == 0
        assert positions[-1] < 4096
        assert all(a < b for a, b in itertools.pairwise(positions))


def test_a_step_draws_the_same_rows_every_time(maker):
    recipe = train.Recipe(seed=3)
    first, again = (train.draw_batch(maker, 40, recipe, Config()) for _ in range(2))
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.positions, again.positions)


def test_the_learning_rate_warms_up_and_ends_near_zero():
    recipe = train.Recipe(n_steps=1000)
    rates = [train.learning_rate(step, recipe) for step in range(1000)]
    assert rates[0] == pytest.approx(recipe.learning_rate / recipe.n_warmup)
    assert rates[200] == rates[499] == max(rates) == recipe.learning_rate
    assert rates[-1] < 0.01 * recipe.learning_rate


def test_manual_pages_become_plain_text():
    roff = '.TH X 1\n.SH NAME\nx \\- does \\fBthings\\fR\n.\\" a comment\n.B "bold words"\n'
    assert corpus.plain_manual(roff) == "NAME\nx - does things\nbold words"

"""The recipe of the embedded model: its parts, and (slow) the whole of it in small."""

import copy
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import balance
import experts
import pytest
import report
import torch
from corpus import HELD_OUT_EVERY, Corpus, read_corpus
from muon import StackedMuon, orthogonalize
from tokens import END, Sequences, train_tokenizer
from train import geometry, train
from training import Recipe, Training
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_mini_moe" / "train.py"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture
def folder(tmp_path):
    """A corpus of three domains: 60 problems, a book whose lines are wrapped, and a module."""
    root = tmp_path / "corpus"
    root.mkdir()
    rows = [
        {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(60)
    ]
    (root / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = "It was a long line of a book that was wrapped where a page would end,"
    verse = "A short line\nand another"
    chapters = "\n\n".join(f"{line} {i}\n{line}\n\n{verse} {i}" for i in range(900))
    start, end = "*** START OF THE BOOK ***", "*** END OF THE BOOK ***"
    (root / "book.txt").write_text(f"licence\n{start}\n{chapters}\n{end}\nlicence")
    (root / "module.py").write_text("def f(x):\n    return x\n" * 40)
    return root


def tiny_model(implementation, layers=2):
    torch.manual_seed(0)
    config = geometry(layers, 300)
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config), experts_implementation=implementation, dtype=torch.float64
    )


def test_sorted_experts_give_transformers_gradients():
    experts.register()
    ids = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(1))
    results = []
    for implementation in ("eager", experts.NAME):
        model = tiny_model(implementation)
        assert model.config._experts_implementation == implementation
        loss = model(ids, labels=ids).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_an_expert_that_nobody_chose_has_no_gradient():
    experts.register()
    block = tiny_model(experts.NAME, layers=1).model.layers[0].mlp.experts
    x = torch.randn(5, 192, dtype=torch.float64)
    index = torch.tensor([[3, 7]] * 5)
    out = block(x, index, torch.full((5, 2), 0.5, dtype=torch.float64))
    grad = torch.autograd.grad(out.square().sum(), block.gate_up_proj)[0]
    assert sorted(grad.abs().sum(dim=(1, 2)).nonzero().flatten().tolist()) == [3, 7]


def test_balance_is_one_where_uniform_and_grows_with_skew():
    uniform = torch.zeros(60, 60)
    assert balance.balance_loss(uniform, torch.arange(60)[:, None]) == pytest.approx(1.0)
    skewed = torch.zeros(60, 60)
    skewed[:, 0] = 10.0
    assert balance.balance_loss(skewed, torch.zeros(60, 1, dtype=torch.long)) > 50


def test_balance_of_each_layer_only_while_listening():
    model = tiny_model("eager", layers=3)
    listener = balance.LayerBalance(model)
    ids = torch.randint(0, 300, (1, 8))
    with listener.listening() as losses:
        model(ids)
    assert len(losses) == 3
    model(ids)
    assert len(losses) == 3


@pytest.mark.parametrize("rows, cols", [(24, 40), (40, 24)])
def test_orthogonalized_matrices_have_singular_values_near_one(rows, cols):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, rows, cols)).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_muon_takes_each_matrix_of_a_split_by_itself():
    """Gate and up rows of very different sizes: together the smaller would hardly move."""
    param = torch.nn.Parameter(torch.zeros(2, 16, 32))
    param.grad = torch.randn(2, 16, 32)
    param.grad[:, 8:] *= 1e-3
    StackedMuon([{"params": [param], "split": 2}], lr=1.0).step()
    assert torch.linalg.svdvals(param[0, 8:].detach()).min() > 0.5


def test_schedule_warms_up_and_ends_low():
    recipe = Recipe(steps=100, warmup=10)
    factors = [recipe.lr_factor(step) for step in range(100)]
    assert factors[9] == 1.0
    assert factors[:10] == sorted(factors[:10])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] < 0.03


def test_corpus_holds_documents_out_and_unwraps_prose(folder):
    corpus = read_corpus(folder, standard_library=False)
    assert len(corpus.held_out["word problems"]) == 60 // HELD_OUT_EVERY
    for domain, held_out in corpus.held_out.items():
        assert not set(held_out) & set(corpus.train[domain])
    problem = corpus.train["word problems"][0]
    assert problem == "Question: What is 0 + 1?\nAnswer: It is 1.\n#### 1"
    book = corpus.train["prose"][0]
    assert "licence" not in book
    assert "would end, 0 It was" in book
    assert "A short line\nand another 0" in book


def test_sequences_depend_on_their_position_alone(folder):
    corpus = read_corpus(folder, standard_library=False)
    tokenizer = train_tokenizer(corpus, 300)
    straight = Sequences(corpus, tokenizer, 32, seed=0)
    everything = [straight.batch(at, 1) for at in range(900)]
    again = Sequences(corpus, tokenizer, 32, seed=0)
    for at in (899, 0, 450):
        assert torch.equal(again.batch(at, 1), everything[at])
    assert not torch.equal(torch.cat(everything[:100]), Sequences(corpus, tokenizer, 32, seed=1).batch(0, 100))


def test_neighbours_in_a_file_are_far_apart_in_training():
    corpus = Corpus()
    corpus.add("Python", [" ".join(f"{i} one two" for i in range(3000))])
    tokenizer = train_tokenizer(corpus, 300)
    in_order = tokenizer(END + corpus.train["Python"][0])["input_ids"]
    rows = [in_order[at : at + 32] for at in range(0, len(in_order) - 31, 32)]
    seen = Sequences(corpus, tokenizer, 32, seed=0).batch(0, len(rows)).tolist()
    assert sorted(seen) == sorted(rows)
    assert sum(seen.index(a) + 1 == seen.index(b) for a, b in pairwise(rows)) < len(rows) / 10


def test_a_repeated_domain_is_seen_as_often_as_wanted(folder):
    corpus = read_corpus(folder, standard_library=False)
    corpus.repeat(["word problems=3"])
    seen = list(corpus.epoch(seed=0))
    assert [seen.count(text) for text in corpus.train["word problems"]] == [3] * len(corpus.train["word problems"])
    assert all(seen.count(text) == 1 for text in corpus.train["prose"])
    for wanted in ("songs=2", "prose", "prose=0", "prose=x"):
        with pytest.raises(ValueError, match=f"^cannot repeat '{wanted}': give .*\"prose=N\""):
            corpus.repeat([wanted])


def test_held_out_loss_is_of_every_document_not_of_one_long_one(folder, monkeypatch):
    corpus = read_corpus(folder, standard_library=False)
    tokenizer = train_tokenizer(corpus, 300)
    monkeypatch.setattr(report, "DOCUMENT_TOKENS", 5)
    ids = report.beginnings(tokenizer, ["one two three " * 50, "four", "five six seven " * 50])
    assert [tokenizer.decode(ids[at]) for at in range(len(ids))].count(END) == 3
    assert len(ids) <= 15


def test_training_learns_and_resumes_to_the_bit(tmp_path):
    experts.register()
    corpus = Corpus()
    corpus.add("word problems", [" ".join(WORDS[i % 7 :] + WORDS[: i % 7]) for i in range(60)])
    tokenizer = train_tokenizer(corpus, 300)
    recipe = Recipe(steps=6, sequences=4, length=16, warmup=2)

    def training():
        torch.manual_seed(0)
        config = geometry(1, len(tokenizer))
        model = AutoModelForCausalLM.from_config(config, experts_implementation=experts.NAME, dtype=torch.float32)
        return model, Training(model, Sequences(corpus, tokenizer, 16, seed=0), recipe, shards=2)

    losses = []
    model, straight = training()

    def on_step(report):
        losses.append(report.loss)
        if report.step == 3:
            straight.save(tmp_path / "checkpoint.pt")

    straight.run(on_step)
    resumed_model, resumed = training()
    resumed.resume(tmp_path / "checkpoint.pt")
    resumed.run(lambda report: None)
    assert losses[-1] < losses[0] - 0.1
    for expected, found in zip(model.parameters(), resumed_model.parameters()):
        assert torch.equal(expected, found)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    corpus = Corpus()
    corpus.add("word problems", [" ".join(WORDS)] * 40)
    tokenizer = train_tokenizer(corpus, 300)

    def training(**changes):
        model = tiny_model("eager", layers=1).float()
        recipe = Recipe(**({"steps": 2, "sequences": 4, "length": 16} | changes))
        return Training(model, Sequences(corpus, tokenizer, 16, seed=0), recipe, shards=2)

    training().save(tmp_path / "checkpoint.pt")
    training(steps=3).resume(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="sequences=4, not 8"):
        training(sequences=8).resume(tmp_path / "checkpoint.pt")
    corpus.repeat(["word problems=2"])
    with pytest.raises(ValueError, match="repeats="):
        training().resume(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="3 sequences cannot be shared by 2"):
        training(sequences=3)


def test_a_corpus_that_is_none_is_one_line(tmp_path):
    for corpus in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SystemExit) as stopped:
            train(corpus=corpus, output=tmp_path / "out")
        assert str(stopped.value).startswith(f"error: {corpus} ")
        assert "\n" not in str(stopped.value)
        assert not (tmp_path / "out").exists()


def test_other_bad_inputs_are_one_line(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*nothing has no tokenizer.json: [^\n]*$"):
        train(corpus=folder, output=tmp_path / "out", init=tmp_path / "nothing", standard_library=False)
    (folder / "numbers.jsonl").write_text("1\n")
    with pytest.raises(SystemExit, match=r"^error: .*numbers.jsonl: give one object a line[^\n]*$"):
        train(corpus=folder, output=tmp_path / "out", standard_library=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smoke_trains_measures_and_writes_a_model(folder, tmp_path):
    out = tmp_path / "model"
    arguments = ["--corpus", str(folder), "--output", str(out), "--smoke"]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (out / "training.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.3
    report = json.loads((out / "report.json").read_text())
    assert set(report["held_out"]) == {"word problems", "prose", "Python"}
    assert set(report["routing"]["hit_rates"]) == {"25%", "50%", "75%"}
    assert len(report["routing"]["layers"]) == 2
    AutoModelForCausalLM.from_pretrained(out)

"""The model of a run is loaded, exported, sampled from and evaluated."""

import dataclasses
import functools
import json
import math
import re
import shutil
import types

import chex
import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from rich.console import Console
from tokenizers import processors

import memopt
from memopt.cli.evaluate import evaluate
from memopt.cli.export import export_run
from memopt.cli.finetune import parse_finetune
from memopt.cli.pretrain import parse
from memopt.cli.sample import sample
from memopt.json_lines import read_json_lines
from memopt.models import llama
from memopt.models.generate import generate
from memopt.text.chats import CHATS
from memopt.text.documents import find_documents
from memopt.text.files import Piece
from memopt.text.tokenizer import ByteTokenizer, load_tokenizer, train_tokenizer
from memopt.training.batches import find_held_out
from memopt.training.evaluation import covered_bytes, evaluate_chats, evaluate_text
from memopt.training.export import export, model_card
from memopt.training.load import LoadedModel, load_model, load_run
from memopt.training.loop import train
from memopt.training.open import open_run
from memopt.training.sampling import continue_text
from tests.text import chat_tokenizers
from tests.training.nano import NANO

FLAGS = (
    "--model=nano --batch-size=8 --seq-len=32 --eval-tokens=512 --steps=4 --eval-every=2 "
    "--checkpoint-every=2 --learning-rate=3e-3"
)


def trained(output, text, *options):
    """A run of four steps, and its last state."""
    flags = [*FLAGS.split(), f"--data={text}", f"--output={output}", *options]
    return train(open_run(parse(flags)), Console(quiet=True))[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    directory = tmp_path_factory.mktemp("plain") / "run"
    return directory, trained(directory, text, "--optimizer=lion", "--mesh=data=1")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, text):
    directory = tmp_path_factory.mktemp("quantized") / "run"
    options = ("--optimizer=lion", "--weights=int4", "--release", "--mesh=data=2,fsdp=2")
    return directory, trained(directory, text, *options)


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def logits(model):
    """The logits of a few tokens, jitted."""
    return jax.jit(lambda tokens: model(tokens))(np.arange(8)[None])


def test_a_loaded_run_has_the_parameters_of_the_step(run):
    directory, state = run
    loaded = load_run(directory, "last")
    chex.assert_trees_all_equal(loaded.params, state.params)
    assert (loaded.step, loaded.config.optimization.optimizer) == (4, "lion")
    assert loaded.tokenizer.name == "bytes"
    best = load_run(directory)
    losses = {
        x["step"]: x["val_loss"]
        for x in read_json_lines(directory / "metrics.jsonl")
        if "val_loss" in x
    }
    assert best.val_loss == min(losses.values()) == losses[best.step]
    built = llama.build_model(loaded.model_config, state.params)
    chex.assert_trees_all_equal(logits(loaded.model), logits(built))


def test_the_model_is_built_once(run):
    loaded = load_run(run[0])
    assert loaded.model is loaded.model


def test_a_quantised_run_of_a_mesh_is_loaded_on_one_device_as_it_is(quantized):
    directory, state = quantized
    loaded = load_run(directory, 4)
    assert {len(x.devices()) for x in jax.tree.leaves(loaded.params)} == {1}
    chex.assert_trees_all_equal(*jax.device_get((loaded.params, state.params)))
    dense = load_run(directory, 4, dequantize=True)
    chex.assert_trees_all_equal(dense.params, memopt.dequantize_params(loaded.params))
    chex.assert_trees_all_close(logits(loaded.model), logits(dense.model), atol=1e-5)


@pytest.mark.slow
def test_the_parameters_to_evaluate_are_those_of_the_optimizer(tmp_path, text):
    state = trained(tmp_path / "run", text, "--optimizer=schedule_free", "--mesh=data=1")
    params = memopt.eval_params("schedule_free", state.opt_state, state.params)
    chex.assert_trees_all_close(load_run(tmp_path / "run", "last").params, params, atol=1e-6)


@pytest.mark.parametrize(
    ("step", "says"), [(3, "step must be best, last or one of 2, 4"), ("nowhere", "got 'nowhere'")]
)
def test_a_step_without_a_checkpoint_is_refused(run, step, says):
    with pytest.raises(ValueError, match=says):
        load_run(run[0], step)


def test_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"run .* is neither the directory of a run nor that of a"):
        load_run(tmp_path)


def test_an_export_is_the_model_again(run, tmp_path):
    loaded = load_run(run[0], "last")
    export(loaded, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    again = llama.from_hugging_face(tmp_path / "model")
    chex.assert_trees_all_equal(params_of(again), loaded.params)
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (256, 256)
    flags = [f"--init={tmp_path / 'model'}", f"--output={tmp_path / 'next'}", *FLAGS.split()[1:]]
    follows = open_run(parse([*flags, *(f"--data={x}" for x in loaded.config.text.data)]))
    chex.assert_trees_all_equal(jax.device_get(follows.state.params), jax.device_get(loaded.params))
    follows.checkpoints.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_may_be_of_another_type(run, tmp_path, dtype):
    loaded = load_run(run[0])
    export(loaded, tmp_path / "model", dtype=dtype)
    again = llama.from_hugging_face(tmp_path / "model")
    assert again.config.param_dtype == dtype
    cast = jax.tree.map(lambda x: x.astype(dtype), loaded.params)
    chex.assert_trees_all_equal(params_of(again), cast)


def test_a_quantised_run_is_exported_decoded(quantized, tmp_path):
    loaded = load_run(quantized[0])
    export(loaded, tmp_path / "model")
    again = llama.from_hugging_face(tmp_path / "model")
    chex.assert_trees_all_equal(params_of(again), memopt.dequantize_params(loaded.params))


@pytest.mark.parametrize(
    ("weights", "mesh"),
    [
        ("int4", "data=1"),
        pytest.param("int8", "data=1", marks=pytest.mark.slow),
        pytest.param("bfloat16+8", "data=1", marks=pytest.mark.slow),
        ("int4", "fsdp=4"),
        pytest.param("int4", "fsdp=2,tensor=2", marks=pytest.mark.slow),
    ],
)
def test_quantised_weights_are_exported_and_read_as_they_are(tmp_path, text, weights, mesh):
    odd = dataclasses.replace(NANO, intermediate_size=33) if mesh == "data=1" else NANO
    store = functools.partial(memopt.quantize_params, codec=weights)
    params = jax.jit(lambda: llama.init_params(odd, store=store))()
    run = LoadedModel(tmp_path, odd, params, ByteTokenizer())
    export(run, tmp_path / "model", quantized=True)
    again, stored = llama.read_hugging_face(tmp_path / "model")
    assert again == dataclasses.replace(odd, eos_ids=(256,))
    chex.assert_trees_all_equal(stored, params)
    model = llama.from_hugging_face(tmp_path / "model")
    chex.assert_trees_all_equal(logits(model), logits(llama.build_model(odd, params)))
    if odd != NANO:
        return
    flags = [f"--init={tmp_path / 'model'}", f"--output={tmp_path / 'next'}", f"--data={text}"]
    flags += [*FLAGS.split()[1:], f"--weights={weights}", f"--mesh={mesh}"]
    follows = open_run(parse(flags))
    chex.assert_trees_all_equal(*jax.device_get((follows.state.params, params)))
    follows.checkpoints.close()


def test_codes_of_another_codec_are_decoded_for_a_run(quantized, tmp_path, text):
    loaded = load_run(quantized[0])
    export(loaded, tmp_path / "model", quantized=True)
    flags = [f"--init={tmp_path / 'model'}", f"--output={tmp_path / 'next'}", f"--data={text}"]
    follows = open_run(parse([*flags, *FLAGS.split()[1:], "--mesh=data=1"]))
    chex.assert_trees_all_close(
        follows.state.params, memopt.dequantize_params(loaded.params), rtol=1e-6
    )
    follows.checkpoints.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantized": True}, "quantized must be left out, since the weights of .* are not"),
        ({"directory": "taken"}, "is taken: give a new or an empty directory"),
    ],
)
def test_what_cannot_be_exported_is_refused(run, tmp_path, options, says):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    options = {"directory": "new"} | options
    with pytest.raises(ValueError, match=says):
        export(load_run(run[0]), tmp_path / options.pop("directory"), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_codes_have_no_other_type(quantized, tmp_path):
    with pytest.raises(ValueError, match="dtype must be left out with quantized"):
        export(load_run(quantized[0]), tmp_path / "new", quantized=True, dtype="float16")


def test_the_model_card_has_the_facts_of_the_run(run, text):
    card = model_card(load_run(run[0], "last"))
    lines = read_json_lines(run[0] / "metrics.jsonl")
    for fact in (
        "| started from | random weights, seed 0 |",
        f"| data | `{text}` |",
        "| steps | 4 of 4 |",
        "| tokens | 1,024 |",
        f"| validation loss a token | {lines[-1]['val_loss']:.4f} |",
        f"| training loss of the last step | {lines[-1]['loss']:.4f} |",
        "| optimizer | lion |",
        f"trained by memopt {memopt.__version__}",
    ):
        assert fact in card


@pytest.mark.slow
def test_a_run_keeps_the_files_of_its_tokenizer(tmp_path, text):
    file = tmp_path / "words.json"
    train_tokenizer(["ab abc abcd"] * 9, 270, file)
    before = load_tokenizer(str(file))
    options = ("--optimizer=lion", "--mesh=data=1", f"--tokenizer={file}", "--vocab-size=300")
    trained(tmp_path / "run", text, *options)
    file.unlink()
    loaded = load_run(tmp_path / "run")
    assert (loaded.tokenizer.digest, loaded.tokenizer.eos_id) == (before.digest, 0)
    export(loaded, tmp_path / "model")
    assert load_tokenizer(str(tmp_path / "model")).digest == before.digest
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|endoftext|>"
    resumed = open_run(parse(["--resume", f"--output={tmp_path / 'run'}", "--steps=6"]))
    assert resumed.tokenizer.digest == before.digest
    resumed.batches.close()


@pytest.fixture
def with_bos(tmp_path):
    """A tokenizer that begins a prompt with <s>, id 1, and ends a document with </s>."""
    directory = chat_tokenizers.write(tmp_path / "with_bos")
    file = str(directory / "tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(file)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    tokenizer.save(file)
    return directory, (bos,), (tokenizer.token_to_id("</s>"),)


@pytest.mark.slow
@pytest.mark.parametrize("is_old", [False, True])
def test_prompts_begin_as_the_documents_of_the_run_did(with_bos, tmp_path, monkeypatch, is_old):
    directory, bos, eos = with_bos
    monkeypatch.setattr("memopt.text.batches.WINDOW_TOKENS", 2**12)  # of short lines
    (tmp_path / "lines.jsonl").write_text('{"text": "The capital"}\n' * 200)
    options = ("--optimizer=lion", "--mesh=data=1", f"--tokenizer={directory}", "--vocab-size=600")
    with monkeypatch.context() as patch:
        if is_old:  # earlier versions began documents with the token that ends them
            patch.setattr("memopt.training.open.load_tokenizer", ends_first)
        trained(tmp_path / "run", tmp_path / "lines.jsonl", *options)
    expected = eos if is_old else bos
    resumed = open_run(parse(["--resume", f"--output={tmp_path / 'run'}", "--steps=6"]))
    began = {ids[0] for ids in documents_of(resumed.validation[""])}
    assert began == set(expected)
    assert len(resumed.history) == 1
    resumed.batches.close()
    loaded = load_run(tmp_path / "run", "last")
    assert loaded.tokenizer.begin_ids == expected
    held_out = find_held_out(loaded.config).sources[""]
    assert evaluate_text(loaded, held_out, max_tokens=512).loss == pytest.approx(
        loaded.val_loss, rel=1e-5
    )
    export(loaded, tmp_path / "model")
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (*expected, *eos)


def ends_first(spec):
    tokenizer = load_tokenizer(spec)
    tokenizer.begin_ids = (tokenizer.eos_id,)
    return tokenizer


def documents_of(batches):
    """The inputs of all documents but the first in their rows, which may begin earlier."""
    for batch in batches:
        for ids, numbers in zip(batch["inputs"], batch["segment_ids"], strict=True):
            yield from (ids[numbers == number] for number in range(2, numbers.max() + 1))


def test_the_evaluation_of_the_held_out_text_is_the_run_s_own(run):
    loaded = load_run(run[0], "last")
    held_out = find_held_out(loaded.config).sources[""]
    found = evaluate_text(loaded, held_out, max_tokens=512, batch_size=3)
    assert found.loss == pytest.approx(loaded.val_loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loaded.val_loss), rel=1e-4)
    assert found.tokens == 512
    assert found.bytes == pytest.approx(512, abs=20)  # ends of documents are no bytes
    assert found.bits_per_byte == pytest.approx(found.total / found.bytes / math.log(2))


def test_all_of_other_text_is_evaluated_on(run, tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("zwölf Boxkämpfer " * 40)
    found = evaluate_text(load_run(run[0]), find_documents([str(path)]), batch_size=3)
    size = len(path.read_bytes())
    assert (found.tokens, found.bytes) == (size + 1, size)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 6, 100])
def test_covered_bytes_are_those_of_the_predicted_tokens(begins, ends, tokens):
    tokenizer, text = ByteTokenizer(), "abcdef"
    ids = [*[256] * begins, *tokenizer.encode(text), *[256] * ends]
    predicted = [x for x in ids[1 : 1 + tokens] if x < 256]
    assert covered_bytes([Piece(text, begins, ends)], tokenizer, tokens) == len(predicted)


@pytest.fixture(scope="module")
def loaded(run):
    return load_run(run[0])


def test_a_continuation_is_what_the_model_generates(loaded):
    ids = np.array([256, *b"ab"])
    expected = np.asarray(generate(loaded.model, ids, 12))[3:]
    assert 256 not in expected
    written = continue_text(loaded, "ab", max_new_tokens=12, temperature=0)
    assert written == loaded.tokenizer.decode(expected)


def test_a_continuation_ends_at_a_stop_or_an_end_token(loaded):
    draw = lambda **options: continue_text(loaded, "ab", max_new_tokens=40, **options)
    text = draw(temperature=1.0)
    assert draw(temperature=1.0) == text != draw(temperature=1.0, seed=1)
    assert draw(temperature=1.0, stop=[text[9:11], text[5:7]]) == text[: text.index(text[5:7])]
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = ord(next(x for x in text[3:] if x.isascii()))
    ended = continue_text(
        dataclasses.replace(loaded, tokenizer=tokenizer), "ab", max_new_tokens=40, temperature=1.0
    )
    assert 0 < len(ended) < len(text)
    assert ended == text[: text.index(chr(tokenizer.eos_id))]
    with pytest.raises(ValueError, match="stop must not be empty"):
        draw(stop=["", "a"])


def test_answers_without_text_are_not_evaluated_on(tuned, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"prompt": "a", "completion": ""}\n' * 2)
    documents = find_documents([str(tmp_path / "empty.jsonl")], records=CHATS)
    with pytest.raises(ValueError, match="holds no text to evaluate on"):
        evaluate_chats(load_run(tuned / "run"), documents)


def test_a_continuation_ends_with_the_model_s_context(loaded):
    text = continue_text(loaded, "a" * 50, max_new_tokens=1000, temperature=0)
    assert 0 < len(text.encode()) <= 13 * 3
    with pytest.raises(ValueError, match="prompt has 101 tokens, but the model reads 64 at most"):
        continue_text(loaded, "a" * 100)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(run, tmp_path):
    loaded = load_run(run[0])
    export(loaded, tmp_path)
    train_tokenizer(["ab abc abcd abcde bcd cde dea eab"] * 9, 280, tmp_path)
    ids = load_tokenizer(str(tmp_path)).vocab_size
    says = f"has {ids} ids, but the model only {loaded.model_config.vocab_size}"
    with pytest.raises(ValueError, match=f"the tokenizer in .* {says}"):
        load_model(tmp_path)


def test_a_model_directory_is_sampled_and_evaluated_like_a_run(run, tmp_path, text):
    export(load_run(run[0], "last"), tmp_path / "model")
    brought, own = load_model(tmp_path / "model"), load_model(run[0], "last")
    assert (brought.config, brought.step) == (None, None)
    shutil.rmtree(tmp_path / "model")
    assert continue_text(brought, "ab") == continue_text(own, "ab")
    held_out = find_held_out(own.config).sources[""]
    compared = [evaluate_text(x, held_out, seq_len=32, max_tokens=512) for x in (brought, own)]
    assert compared[0] == compared[1]


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run on chats, with a template of its own."""
    directory = tmp_path_factory.mktemp("tuned")
    turns = lambda i: [{"role": "user", "content": f"{i}+1"}, {"role": "assistant", "content": "é"}]
    rows = [json.dumps({"messages": turns(i)}) for i in range(60)]
    (directory / "chats.jsonl").write_text("\n".join(rows))
    (directory / "mine.jinja").write_text(TEMPLATE)
    flags = (
        f"--model=nano --data={directory / 'chats.jsonl'} --seq-len=64 --eval-tokens=6400 "
        f"--chat-template={directory / 'mine.jinja'} --steps=4 --eval-every=4 --optimizer=lion "
        f"--mesh=data=1 --output={directory / 'run'}"
    )
    train(open_run(parse_finetune(flags.split())), Console(quiet=True))
    (directory / "mine.jinja").unlink()
    return directory


def test_a_run_on_chats_answers_by_its_template(tuned, tmp_path):
    loaded = load_run(tuned / "run")
    ids = [*b"user: 7+1", 256, *b"assistant: "]
    expected = np.asarray(generate(loaded.model, np.array(ids), 8))[len(ids) :]
    assert continue_text(loaded, "7+1", temperature=0, max_new_tokens=8) == (
        loaded.tokenizer.decode(
            expected[: np.argmax(expected == 256)] if 256 in expected else expected
        )
    )
    plain = np.asarray(generate(loaded.model, np.array([256, *b"7+1"]), 8))[4:]
    assert continue_text(loaded, "7+1", temperature=0, max_new_tokens=8, format="text") == (
        loaded.tokenizer.decode(plain[: np.argmax(plain == 256)] if 256 in plain else plain)
    )
    export(loaded, tmp_path / "model")
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == TEMPLATE
    brought = load_model(tmp_path / "model")
    answers = [continue_text(x, "7+1", seed=1, format="chats") for x in (loaded, brought)]
    assert answers[0] == answers[1]


def test_chats_are_evaluated_by_their_answers(tuned, capsys):
    loaded = load_run(tuned / "run")
    lines = shown(capsys, evaluate, tuned / "run").splitlines()
    tokens, size = (int(x) for x in re.findall(r"(\d+) (?:tokens|bytes)", lines[1]))
    assert (tokens % 3, size) == (0, tokens // 3 * 2)  # "é" is two bytes, and an end follows
    assert lines[2].startswith(f"a token    loss {loaded.val_loss:.4f}, ")
    whole = shown(capsys, evaluate, tuned / "run", "--data", tuned / "chats.jsonl").splitlines()
    assert whole[1] == f"data       {tuned / 'chats.jsonl'}: 180 tokens, 120 bytes"


class EndOfTurn(ByteTokenizer):
    """Bytes, and a token that ends turns only."""

    special_tokens = types.MappingProxyType({"<|endoftext|>": 256, "<|end|>": 257})
    vocab_size = 258

    def encoder_with(self, stand_ins):
        ids = {stand_in: self.special_tokens[name] for name, stand_in in stand_ins.items()}
        pattern = "|".join(map(re.escape, ids))

        def encode(text):
            parts = re.split(f"({pattern})", text)
            parts = [[ids[x]] if x in ids else self.encode(x) for x in parts]
            return np.concatenate(parts).astype(np.int32)

        return encode


def test_the_token_that_ends_an_answer_ends_it_whatever_ends_documents(tuned, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("{{ eos_token }}", "<|end|>"))
    run = load_run(tuned / "run")
    assert run.end_ids == (256,)
    other = dataclasses.replace(run, path=tmp_path, tokenizer=EndOfTurn())
    assert other.end_ids == (257, 256)


@pytest.mark.parametrize(("wants", "ends"), [("system", (257, 256)), ("nobody", (256,))])
def test_a_template_that_wants_more_than_a_user_has_an_end_too(tuned, tmp_path, wants, ends):
    refuse = "{% if messages[0].role != '" + wants + "' %}{{ raise_exception('no') }}{% endif %}"
    template = TEMPLATE.replace("{{ eos_token }}", "<|end|>")
    (tmp_path / "chat_template.jinja").write_text(refuse + template)
    run = dataclasses.replace(load_run(tuned / "run"), path=tmp_path, tokenizer=EndOfTurn())
    assert run.end_ids == ends


def shown(capsys, command, *arguments):
    command([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_print_what_the_functions_return(run, tmp_path, capsys):
    directory, model, text = run[0], tmp_path / "model", tmp_path / "text.txt"
    text.write_text("größer " * 99)
    assert shown(capsys, export_run, directory, model, "--step=2") == (
        f"step 2 of {directory} is in {model}\n"
    )
    assert json.loads((model / "config.json").read_text())["hidden_size"] == NANO.hidden_size
    options = ("--prompt=ab", "--max-new-tokens=9", "--temperature=2", "--seed=3", "--stop=zzz")
    expected = continue_text(
        load_run(directory, 2), "ab", max_new_tokens=9, temperature=2.0, seed=3, stop=["zzz"]
    )
    sample([str(directory), *options, "--step=2"])
    printed = capsys.readouterr()
    assert printed.out == f"{expected}\n"
    assert printed.err == f"memopt: step 2 of {directory}\n"
    lines = shown(capsys, evaluate, directory, "--step=last").splitlines()
    loss = load_run(directory, "last").val_loss
    assert lines[0] == f"model      {directory}, step 4"
    assert lines[1].startswith("data       what the run held out: 512 tokens, ")
    assert lines[2] == f"a token    loss {loss:.4f}, perplexity {math.exp(loss):.3f}"
    assert lines[3].endswith(" bits")
    whole = shown(capsys, evaluate, model, "--data", text, "--seq-len=64").splitlines()
    assert whole[1] == f"data       {text}: 892 tokens, 891 bytes"


def test_an_empty_answer_is_told(run, monkeypatch, capsys):
    monkeypatch.setattr("memopt.cli.sample.continue_text", lambda *_, **__: "")
    sample([str(run[0]), "--prompt=ab"])
    assert capsys.readouterr().err.endswith("\n(the model ended its answer at once)\n")


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        (export_run, ["RUN", "TAKEN"], "is taken: give a new or an empty directory"),
        (export_run, ["RUN", "new", "--step=7"], "step must be best, last or one of 2, 4"),
        (export_run, ["TAKEN", "new"], "is neither the directory of a run nor that of a Hugging"),
        (export_run, ["MODEL", "new"], "is a Hugging Face model, not a run"),
        (sample, ["nowhere", "--prompt=a"], "run: there is no directory 'nowhere'."),
        (sample, ["RUN", "--prompt=a", "--top-p=0"], "top_p is 0.0; it must be above 0"),
        (sample, ["RUN", "--prompt=a", "--max-new-tokens=0"], "max_new_tokens must be at least 1"),
        (evaluate, ["MODEL"], "is a model without data of its own: give --data"),
        (evaluate, ["RUN", "--data=nowhere"], "matches no text file"),
        (evaluate, ["RUN", "--seq-len=65"], "seq_len=65 is longer than the 64 tokens"),
    ],
)
def test_a_command_that_cannot_work_ends_in_a_sentence(
    run, tmp_path, capsys, command, arguments, says
):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    if "MODEL" in arguments:
        export(load_run(run[0]), tmp_path / "model")
    places = {"RUN": run[0], "TAKEN": tmp_path / "taken", "MODEL": tmp_path / "model"}
    places["new"] = tmp_path / "new"
    with pytest.raises(SystemExit) as ended:
        command([str(places.get(argument, argument)) for argument in arguments])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.startswith("memopt: ")
    assert message.count("\n") == 1
    assert not (tmp_path / "new").exists()

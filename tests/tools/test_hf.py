import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from common import checkpoint
from common.config import UserError
from model import ModelConfig, Phi, load_model
from sample import Generator
from tests.core.test_tokenizer import AWKWARD
from tokenizer import END_OF_TEXT, Tokenizer
from tokenizer.to_json import to_json
from tools import hf

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

# no two sizes are equal, and 6 / 14 is no exact share of the head dim
SHAPE = ModelConfig(vocab_size=512, seq_len=64, n_layer=2, n_head=3, width=42, mlp_width=50,
                    rotary_dim=6, rope_theta=5000.0, dropout=0.25)  # fmt: skip
PROMPTS = ["def append_0(", "", "    return y * append + 9\n", f"# {END_OF_TEXT}\u2581 é\n\tif a"]
STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def ours(tokens, tmp_path_factory) -> Path:
    """A checkpoint of large random weights, so that the greedy choices are clear and varied."""
    tokenizer = Tokenizer(tokens)
    torch.manual_seed(0)
    model = Phi(SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.1, 0.3)
        # Broken UTF-8 is where the two decoders differ; a trained model hardly writes any.
        names = [tokenizer.backend.model.id_to_piece(i) for i in range(tokenizer.vocab_size)]
        model.head.bias[[i for i, name in enumerate(names) if name.startswith("<0x")]] = -1e4
    run = tmp_path_factory.mktemp("hf") / "run"
    folder = run / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    hf.write_checkpoint(folder, model, tokenizer, {"step": 7, "run": "out/somewhere"})
    (run / "config.json").write_text(json.dumps({"lr": 0.00123}))
    return folder


@pytest.fixture(scope="module")
def exported(ours, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "exported"
    hf.export(hf.Export(ours, out))
    return out


@pytest.fixture(scope="module")
def theirs(exported):
    """The export as transformers loads it: model and tokenizer."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        exported, output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(model).__name__ == "PhiForCausalLM"
    return model.eval(), transformers.AutoTokenizer.from_pretrained(exported)


def close_logits(run: Path, model) -> None:
    """Asserts that both libraries' logits differ by no more than fp32 rounding."""
    mine, _, _ = load_model(run, "cpu")
    idx = torch.randint(mine.c.vocab_size, (3, mine.c.seq_len))
    with torch.no_grad():
        want, got = model.float()(idx).logits, mine(idx)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6 * want.abs().max().item())


def test_same_logits(ours, theirs):
    close_logits(ours, theirs[0])


def test_same_settings(theirs):
    config = theirs[0].config
    assert config.rope_parameters["rope_theta"] == SHAPE.rope_theta
    assert config.attention_dropout == config.resid_pdrop == SHAPE.dropout
    assert config.max_position_embeddings == theirs[1].model_max_length == SHAPE.seq_len
    assert theirs[0].generation_config.eos_token_id == theirs[1].eos_token_id


def test_config_json_of_transformers_4(exported, tmp_path):
    """There rope_theta and partial_rotary_factor stand beside the sizes; others look there too."""
    h = json.loads((exported / "config.json").read_text())
    del h["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(h))
    assert hf.model_config(tmp_path / "config.json") == SHAPE
    rope = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (5000.0, 6 / 14)


def test_same_greedy_text(ours, theirs):
    model, tokenizer = theirs
    want = Generator.load(ours, "cpu").generate(PROMPTS, 20)
    assert len(set(want)) == len(want)
    for prompt, text in zip(PROMPTS, want):
        inputs = tokenizer(prompt, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == text


def check_tokens(ours: Tokenizer, theirs, text: str) -> None:
    ids = ours.encode(text)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs(text)["input_ids"] == ours.start + ids
    assert theirs.decode(ids, skip_special_tokens=True) == text == ours.decode(ids)


def test_same_tokens_for_files(ours, theirs):
    files = sorted(STDLIB.glob("*.py"))
    for path in random.Random(0).sample(files, 40):
        check_tokens(Tokenizer(ours), theirs[1], path.read_text(encoding="utf-8")[:50_000])


@pytest.fixture(scope="module")
def tokenizer(ours):
    return Tokenizer(ours)


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(AWKWARD) | st.text(max_size=20)).map("".join))
def test_same_tokens_for_any_text(tokenizer, theirs, text):
    check_tokens(tokenizer, theirs[1], text)


def test_decodes_every_token_alike(tokenizer, theirs):
    for i in range(tokenizer.vocab_size):
        assert theirs[1].decode([i], skip_special_tokens=True) == tokenizer.decode([i])


@pytest.mark.parametrize("letters", ["ab", "ab ", "aab \n"])
def test_same_tokens_where_pieces_overlap(tmp_path, letters):
    """Two letters only, so that every piece can be made from many pairs, and overlaps itself."""
    r = random.Random(letters)

    def text():
        return "".join(r.choice(letters) for _ in range(r.randrange(1, 60)))

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ", *(text() for _ in range(3000))]), character_coverage=1.0,
        model_prefix=str(tmp_path / "m"), model_type="bpe", vocab_size=600,
        byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True,
        bos_id=-1, pad_id=-1, eos_piece=END_OF_TEXT, minloglevel=2,
    )  # fmt: skip
    mine = Tokenizer(tmp_path / "m.model")
    other = tokenizers.Tokenizer.from_str(to_json(mine))
    for _ in range(2000):
        sample = text()
        assert other.encode(sample, add_special_tokens=False).ids == mine.encode(sample)


def test_a_model_of_another_trainer_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words and some more words"] * 50), model_type="unigram",
        model_prefix=str(tmp_path / "m"), vocab_size=300, byte_fallback=True, bos_id=-1,
        eos_piece=END_OF_TEXT, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="cannot be written as a tokenizer"):
        to_json(Tokenizer(tmp_path / "m.model"))


def test_there_and_back_is_exact(ours, exported, tmp_path):
    hf.import_(hf.Import(exported, tmp_path / "back"))
    back = tmp_path / "back"
    hf.export(hf.Export(back, tmp_path / "again"))
    for file in ("model.safetensors", "tokenizer.model"):
        assert (back / file).read_bytes() == (ours / file).read_bytes()
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (exported / file).read_bytes()
    want, got = (checkpoint.read_meta(folder) for folder in (ours, back))
    assert got["model"] == want["model"] == dataclasses.asdict(SHAPE)
    assert got["tokenizer"] == want["tokenizer"]


def test_model_card(ours, exported):
    card = (exported / "README.md").read_text()
    for said in (
        "# somewhere",
        "0.00123",
        checkpoint.checksum(ours),
        '"step": 7',
        "PhiForCausalLM",
    ):
        assert said in card
    assert str(ours) not in card


def test_every_rotary_dim_is_held():
    for head_dim in range(1, 200):
        for rotary_dim in range(0, head_dim + 1, 2):
            c = ModelConfig(n_head=1, width=head_dim, rotary_dim=rotary_dim)
            assert int(head_dim * hf.rotary_factor(c)) == rotary_dim


def test_names_and_shapes_of_phi1():
    with torch.device("meta"):
        theirs = transformers.PhiForCausalLM(transformers.PhiConfig()).state_dict()
        ours = hf.parts(Phi(ModelConfig()))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """Random weights in the format of the released phi-1: float16 in shards, the config.json of
    transformers 4, a byte-level BPE with runs of spaces and tabs, fewer tokens than embeddings."""
    folder = tmp_path_factory.mktemp("hf") / "released"
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    lines = [line for name in ("ast", "heapq", "json/decoder")
             for line in (STDLIB / f"{name}.py").read_text().splitlines(keepends=True)]  # fmt: skip
    bpe.train_from_iterator(lines, trainer)
    bpe.add_special_tokens([END_OF_TEXT])
    bpe.add_tokens([" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)])
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=700, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=300, bos_token_id=None, eos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    model = transformers.PhiForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 10)  # biases and LayerNorms too
        model.lm_head.bias[bpe.get_vocab_size() :] = -1e4  # what has no token is not written
    model.half().save_pretrained(folder, max_shard_size="60KB")
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": False,
                "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT,
                "unk_token": END_OF_TEXT, "model_max_length": 300}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    h = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "dtype"):
        del h[key]
    h |= {"rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 0.5,
          "torch_dtype": "float16", "num_key_value_heads": None}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(h))
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def imported(cli, released, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "imported"
    done = cli("-m", "tools.hf", "import", "--source", released, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_released_format_has_the_same_logits(released, imported):
    model = transformers.AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
    close_logits(imported, model)


def test_released_format_has_the_same_tokens(released, imported):
    mine = Generator.load(imported, "cpu")
    theirs = transformers.AutoTokenizer.from_pretrained(released)
    r = random.Random(0)
    files = r.sample(sorted(STDLIB.glob("*.py")), 20)
    texts = [path.read_text(encoding="utf-8")[:20_000] for path in files]
    texts += ["".join(r.choices(AWKWARD, k=10)).replace(END_OF_TEXT, "") for _ in range(200)]
    for text in texts:
        ids = mine.tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids == mine.encode(text)  # and nothing before them
        assert mine.tokenizer.decode(ids) == text
    assert mine.tokenizer.end_of_text not in mine.tokenizer.encode(END_OF_TEXT)
    assert mine.encode("") == [mine.tokenizer.end_of_text]  # a model needs a token to go on from


def test_released_format_has_the_same_greedy_text(released, imported):
    model = transformers.AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(released)
    prompts = ["def f(x):\n    ", "import json\n", "class A:\n\t\t"]
    want = Generator.load(imported, "cpu").generate(prompts, 30)
    for prompt, text in zip(prompts, want):
        inputs = tokenizer(prompt, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=30, do_sample=False,
                             eos_token_id=tokenizer.eos_token_id)[0]  # fmt: skip
        assert tokenizer.decode(new[inputs["input_ids"].shape[1] :],
                                skip_special_tokens=True) == text  # fmt: skip


def test_released_format_there_and_back(released, imported, tmp_path):
    hf.export(hf.Export(imported, tmp_path / "out"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    before = transformers.AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
    for name, tensor in before.state_dict().items():
        assert torch.equal(again[name], tensor), name
    json_file = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert json_file == (released / "tokenizer.json").read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def f():\n        return 'x   y'\t\t"
    assert tokenizer(text)["input_ids"] == Tokenizer(released).encode(text)


def test_an_import_is_evaluated(cli, imported, tmp_path):
    problem = {
        "task_id": "t/0", "prompt": "def one():\n", "canonical_solution": "    return 1\n",
        "entry_point": "one", "test": "def check(f):\n    assert f() == 1\n",
    }  # fmt: skip
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    done = cli("-m", "eval.humaneval", "--problems", tmp_path / "problems.jsonl", "--checkpoint",
               imported, "--max_new_tokens=8", "--device=cpu",
               "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "results.json").exists()


def altered(source: Path, out: Path, change) -> Path:
    """A copy of the export `source` after change(copy)."""
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    change(out)
    return out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_dim": 16}, "head_dim is 16, and this model can only have 14"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, .* only have 3"),
        ({"partial_rotary_factor": 0.5, "rope_parameters": {}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is {"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', .* 'gelu_new' or 'gelu_pytorch_tanh'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"qk_layernorm": True}, "qk_layernorm is True"),
        ({"resid_pdrop": 0.1}, "resid_pdrop is 0.1, .* attention_dropout's 0.25"),
        ({"embd_pdrop": 0.1}, "embd_pdrop is 0.1"),
        ({"model_type": "phi-msft"}, "model_type is 'phi-msft', .* only have 'phi'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"hidden_size": "42"}, "hidden_size is '42', .* an integer"),
        ({"vocab_size": 400}, "512 tokens, more than the vocab_size 400"),
        ({"vocab_size": 600}, r"embed_tokens.weight is \[512, 42\], .* makes it \[600, 42\]"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.bias is missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.bias has no place"),
    ],
)
def test_what_the_model_cannot_hold(exported, tmp_path, settings, message):
    def change(folder):
        h = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(h | settings))

    source = altered(exported, tmp_path / "in", change)
    with pytest.raises(UserError, match=message):
        hf.import_(hf.Import(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def without_bias(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.bias"]
    save_file(weights, folder / "model.safetensors")


def as_integers(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.to(torch.int8) for name, tensor in weights.items()},
        folder / "model.safetensors",
    )


def as_index(names):
    def change(folder):
        (folder / "model.safetensors").unlink()
        index = {"weight_map": dict.fromkeys("ab", names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_bias, "lm_head.bias is missing; want exactly PhiForCausalLM's"),
        (as_integers, "is torch.int8, want float32, 16 or bfloat16"),
        (as_index("../elsewhere.safetensors"), "names files outside of its folder"),
        (as_index("absent.safetensors"), "absent.safetensors cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "pickles .* are not read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "cannot be read"),
        (lambda f: (f / "config.json").unlink(), "cannot read .*config.json"),
        (lambda f: (f / "config.json").write_text("["), "is not JSON"),
        (lambda f: (f / "tokenizer.model").write_text("["), "not a SentencePiece model"),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "no tokenizer at"),
    ],
)
def test_broken_folders(exported, tmp_path, change, message):
    source = altered(exported, tmp_path / "in", change)
    with pytest.raises(UserError, match=message):
        hf.import_(hf.Import(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "does not give back the text it encodes"),
        ({"added_tokens": []}, "has no <.endoftext.> token"),
        ({"model": None}, "is not a tokenizer.json"),
    ],
)
def test_tokenizers_that_lose_text(released, tmp_path, change, message):
    value = json.loads((released / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(value | change))
    with pytest.raises(UserError, match=message):
        Tokenizer(tmp_path)


def test_byte_level_tokenizers_need_the_extra(released, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="needs tokenizers, an extra: pip install tokenizers"):
        Tokenizer(released)


def test_byte_level_tokenizers_refuse_lone_surrogates(released):
    with pytest.raises(UserError, match="lone surrogates"):
        Tokenizer(released).encode("a\ud800")


def test_command(cli, ours, tmp_path):
    done = cli("-m", "tools.hf", "export", "--checkpoint", ours, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"-> {tmp_path / 'out'}" in done.stdout
    for arguments in ([], ["explode"]):
        done = cli("-m", "tools.hf", *arguments)
        assert done.returncode == 2
        assert "want one of export, import" in done.stderr
    assert "tools.hf import --source" in cli("-m", "tools.hf", "--help").stdout


SERVER_NEEDS = ("fastapi", "uvicorn", "openai", "accelerate")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, SERVER_NEEDS)), reason=f"needs {', '.join(SERVER_NEEDS)}"
)
def test_served_completions_are_ours(ours, exported, tmp_path):
    """`transformers serve` on the loopback interface, asked by OpenAI's client."""
    from openai import OpenAI

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(exported),
               "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
        want = Generator.load(ours, "cpu").generate(PROMPTS, 20)
        for prompt, text in zip(PROMPTS, want):
            answer = client.completions.create(
                model=str(exported), prompt=prompt, max_tokens=20, temperature=0
            )
            assert answer.choices[0].text == text
    finally:
        server.kill()
        server.wait()

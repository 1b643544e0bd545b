import dataclasses
import json
import random
import shutil
import sysconfig
from pathlib import Path

import pytest
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
from tools import hf

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

# all sizes differ, and 6 / 14 is inexact in floating point
SHAPE = ModelConfig(vocab_size=512, seq_len=64, n_layer=2, n_head=3, width=42, mlp_width=50,
                    rotary_dim=6, rope_theta=5000.0, dropout=0.25, qk_norm=True)  # fmt: skip
PROMPTS = ["def append_0(", "", "    return y * append + 9\n", f"# {END_OF_TEXT}\u2581 é\n\tif a"]
STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def ours(tokens, tmp_path_factory) -> Path:
    """A checkpoint with large random weights, for clear and varied greedy choices."""
    tokenizer = Tokenizer(tokens)
    torch.manual_seed(0)
    model = Phi(SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.1, 0.3)
        # The decoders differ only on broken UTF-8, which trained models rarely write.
        names = [tokenizer.backend.model.id_to_piece(i) for i in range(tokenizer.vocab_size)]
        model.head.bias[[i for i, name in enumerate(names) if name.startswith("<0x")]] = -1e4
    folder = tmp_path_factory.mktemp("hf") / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    hf.write_checkpoint(folder, model, tokenizer, {"step": 7, "run": "out/somewhere"})
    return folder


@pytest.fixture(scope="module")
def exported(ours) -> Path:
    hf.export(hf.Export(ours, ours.with_name("exported")))
    return ours.with_name("exported")


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
    """Assert that both libraries' logits differ by no more than fp32 rounding."""
    mine, _, _ = load_model(run, "cpu")
    idx = torch.randint(mine.c.vocab_size, (3, mine.c.seq_len))
    with torch.no_grad():
        want, got = model.float()(idx).logits, mine(idx)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6 * want.abs().max().item())


def same_greedy_text(checkpoint: Path, model, tokenizer, prompts: list[str]) -> None:
    want = Generator.load(checkpoint, "cpu").generate(prompts, 20)
    assert len(set(want)) == len(want)
    for prompt, text in zip(prompts, want):
        inputs = tokenizer(prompt, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=20, do_sample=False,
                             eos_token_id=tokenizer.eos_token_id)[0]  # fmt: skip
        new = new[inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == text


def test_same_logits_and_greedy_text(ours, theirs):
    close_logits(ours, theirs[0])
    assert theirs[0].config.attention_dropout == theirs[0].config.resid_pdrop == SHAPE.dropout
    assert theirs[0].generation_config.eos_token_id == theirs[1].eos_token_id
    same_greedy_text(ours, *theirs, PROMPTS)


PARTS = st.sampled_from(AWKWARD) | st.text(max_size=20) | st.text("ab \n")


@settings(max_examples=60, deadline=None)
@given(text=st.lists(PARTS).map("".join))
def test_same_tokens_for_any_text(ours, theirs, text):
    mine, other = Tokenizer(ours), theirs[1]
    ids = mine.encode(text)
    assert other(text, add_special_tokens=False)["input_ids"] == ids
    assert other(text)["input_ids"] == mine.start + ids
    assert other.decode(ids, skip_special_tokens=True) == text == mine.decode(ids)


def test_there_and_back_is_exact(in_process, ours, exported, tmp_path):
    back = tmp_path / "back"
    assert in_process(hf.main, "import", "--source", exported, "--out", back)[0] == 0
    hf.export(hf.Export(back, tmp_path / "again"))
    for file in ("model.safetensors", "tokenizer.model"):
        assert (back / file).read_bytes() == (ours / file).read_bytes()
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (exported / file).read_bytes()
    assert checkpoint.read_meta(back)["model"] == dataclasses.asdict(SHAPE)
    assert checkpoint.checksum(ours) in (exported / "README.md").read_text()


def test_every_rotary_dim_is_held():
    for head_dim in range(1, 100):
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
    transformers 4, a byte-level BPE with runs of spaces, fewer tokens than embeddings."""
    folder = tmp_path_factory.mktemp("hf") / "released"
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    bpe.train_from_iterator((STDLIB / "heapq.py").read_text().splitlines(keepends=True), trainer)
    bpe.add_special_tokens([END_OF_TEXT])
    bpe.add_tokens([" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)])
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=500, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=300, bos_token_id=None, eos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    model = transformers.PhiForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 10)  # biases and LayerNorms too
        model.lm_head.bias[bpe.get_vocab_size() :] = -1e4  # never pick an id without a token
    model.half().save_pretrained(folder, max_shard_size="60KB")
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": False,
                "model_max_length": 300}  # fmt: skip
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    h = json.loads((folder / "config.json").read_text())
    del h["rope_parameters"], h["dtype"]
    h |= {"rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 0.5,
          "torch_dtype": "float16", "num_key_value_heads": None}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(h))
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def imported(released) -> Path:
    hf.import_(hf.Import(released, released.with_name("imported")))
    return released.with_name("imported")


def test_released_format_has_the_same_logits_and_text(released, imported, tmp_path):
    original = transformers.AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
    close_logits(imported, original)
    tokenizer = transformers.AutoTokenizer.from_pretrained(released)
    same_greedy_text(imported, original, tokenizer, ["def f(x):\n    ", "class A:\n\t\t"])
    hf.export(hf.Export(imported, tmp_path / "out"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in original.state_dict().items():
        assert torch.equal(again[name], tensor), name
    json_file = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert json_file == (released / "tokenizer.json").read_bytes()


def test_released_format_has_the_same_tokens(released, imported):
    mine = Generator.load(imported, "cpu")
    theirs = transformers.AutoTokenizer.from_pretrained(released)
    r, texts = random.Random(0), [(STDLIB / "argparse.py").read_text()[:20_000]]
    texts += ["".join(r.choices(AWKWARD, k=10)).replace(END_OF_TEXT, "") for _ in range(100)]
    for text in texts:
        ids = mine.tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids == mine.encode(text)  # no start tokens
        assert mine.tokenizer.decode(ids) == text
    assert mine.tokenizer.end_of_text not in mine.tokenizer.encode(END_OF_TEXT)
    assert mine.encode("") == [mine.tokenizer.end_of_text]  # a model needs one input token


def config(**settings):
    """Return a function that changes a folder's config.json."""

    def change(folder):
        h = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(h | settings))

    return change


def weight(name, value):
    """Return a function that changes one number of a folder's tensor `name`."""

    def change(folder):
        weights = load_file(folder / "model.safetensors")
        weights[name][3] = value
        save_file(weights, folder / "model.safetensors")

    return change


def leave_merges(folder):
    for path in folder.glob("tokenizer.*"):
        path.unlink()
    (folder / "merges.txt").touch()


@pytest.mark.parametrize(("change", "message"), [
    (config(num_key_value_heads=1), "num_key_value_heads is 1, .* supports only None or 3"),
    (config(partial_rotary_factor=0.5, rope_parameters={}), "rotary_dim is 7"),
    (config(rope_parameters={"rope_type": "yarn"}), "rope_type is 'yarn'"),
    (config(hidden_act="gelu"), "hidden_act is 'gelu', .* 'gelu_new' or 'gelu_pytorch_tanh'"),
    (config(vocab_size=400), "512 tokens, more than the vocab_size 400"),
    (config(vocab_size=600), r"embed_tokens.weight has shape \[512, 42\], .* wants \[600, 42\]"),
    (config(num_hidden_layers=3), "model.layers.2.input_layernorm.bias is missing"),
    (config(num_hidden_layers=1), "model.layers.1.input_layernorm.bias is not in"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x"), "cannot be read"),
    (weight("model.layers.1.self_attn.k_layernorm.weight", 1.3), "k_layernorm.weight is not 1.5"),
    (weight("lm_head.bias", float("nan")), "lm_head.bias has NaN or inf"),
    (weight("model.layers.1.mlp.fc2.weight", -float("inf")), "1.mlp.fc2.weight has NaN or inf"),
    (leave_merges, r"no tokenizer.json; .*from_pretrained\(FOLDER\).save_pretrained\(FOLDER\)"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
])  # fmt: skip
def test_what_cannot_be_imported(exported, tmp_path, change, message):
    shutil.copytree(exported, tmp_path / "in")
    change(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        hf.import_(hf.Import(tmp_path / "in", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"resid_pdrop": 0.1}, {"embd_pdrop": 0.1}])
def test_dropouts_that_differ_become_0(exported, tmp_path, change, capsys):
    shutil.copytree(exported, tmp_path / "in")
    config(**change)(tmp_path / "in")
    hf.import_(hf.Import(tmp_path / "in", tmp_path / "out"))
    assert checkpoint.read_meta(tmp_path / "out")["model"]["dropout"] == 0
    assert "dropout becomes 0" in capsys.readouterr().out


def test_a_tokenizer_that_loses_text(released, tmp_path):
    value = json.loads((released / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(value | {"normalizer": {"type": "NFC"}}))
    with pytest.raises(UserError, match="does not round-trip text"):
        Tokenizer(tmp_path)

"""Convert checkpoints to Hugging Face's PhiForCausalLM format and back.

    python -m tools.hf export --checkpoint out/demo/runs/exercises --out out/demo/hf
    python -m tools.hf import --source phi-1 --out out/phi-1

`AutoModelForCausalLM` and `AutoTokenizer` load an export without our code. An import is a
checkpoint folder without training state, for sample.py, the evaluators and `train.py --init_from`.
Weights are copied exactly: a round trip is bitwise identical. Anything that the other format cannot
represent is an error.
"""

import dataclasses
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import checkpoint
from common.config import UserError, parse, run
from common.files import new_folder, read_json, write_json
from model import QK_NORM, ModelConfig, Phi, load_model, parameter_count
from tokenizer import END_OF_TEXT, JSON_FILE, MODEL_FILE, Tokenizer
from tokenizer.to_json import to_json

WEIGHTS_FILE = "model.safetensors"
QK_NORMS = "self_attn.q_layernorm", "self_attn.k_layernorm"  # trainable there, constant here
# {config.json key: ModelConfig field}; both default to phi-1's values.
NAMES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "seq_len",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "qk_layernorm": "qk_norm",
}
# {key: values model.py supports}; a missing key means the first one, as in PhiConfig.
FIXED = {
    "model_type": ("phi",),
    "hidden_act": ("gelu_new", "gelu_pytorch_tanh"),  # both are tanh-GELU
    "layer_norm_eps": (1e-5,),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


@dataclass(frozen=True)
class Export:
    """Export a checkpoint to a Hugging Face folder."""

    checkpoint: Path  # checkpoint folder, or run folder (uses its best checkpoint)
    out: Path  # folder to write


@dataclass(frozen=True)
class Import:
    """Import a Hugging Face folder of PhiForCausalLM weights, such as phi-1's, as a checkpoint."""

    source: Path  # folder with config.json, model.safetensors (or shards) and tokenizer.json
    out: Path  # checkpoint folder to write


def main() -> None:
    commands = {"export": (Export, export), "import": (Import, import_)}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in commands:
        raise UserError(f"first argument must be {' or '.join(commands)}, then options or --help")
    cls, command = commands[name]
    command(parse(cls, sys.argv[2:]))


def export(config: Export) -> None:
    """Write `config.checkpoint` to `config.out` as PhiForCausalLM."""
    model, tokenizer, source = load_model(config.checkpoint, "cpu")
    marks = ("bos_token", "eos_token", "pad_token")
    ids = {f"{mark}_id": tokenizer.end_of_text for mark in marks}
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # uses tokenizer.json unchanged
        **dict.fromkeys(marks, END_OF_TEXT),
        "padding_side": "left",
        "model_max_length": model.c.seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # the text <|endoftext|> is plain text, as in training
    }
    with new_folder(config.out, [source]) as folder:
        weights = {name: part.detach().contiguous() for name, part in parts(model).items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / WEIGHTS_FILE).chmod(0o644)  # a server may run as another user
        write_json(folder / "config.json", phi_config(model.c, tokenizer))
        write_json(folder / "generation_config.json", {"do_sample": False, **ids})
        (folder / JSON_FILE).write_text(to_json(tokenizer), encoding="utf-8")
        write_json(folder / "tokenizer_config.json", tokens)
        if tokenizer.path.name == MODEL_FILE:
            shutil.copyfile(tokenizer.path, folder / MODEL_FILE)  # for importing it back
        (folder / "README.md").write_text(model_card(source, model.c, tokenizer), encoding="utf-8")
    print(f"exported {source} ({parameter_count(model.c):,} parameters) -> {config.out}")


def import_(config: Import) -> None:
    """Write the PhiForCausalLM in `config.source` to the checkpoint folder `config.out`."""
    c = model_config(config.source / "config.json")
    if not any((config.source / name).exists() for name in (MODEL_FILE, JSON_FILE)):
        raise UserError(
            f"{config.source} has no {JSON_FILE}; to make it from vocab.json and merges.txt, run "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    tokenizer = Tokenizer(config.source)
    if (n := tokenizer.vocab_size) > c.vocab_size:
        raise UserError(f"{tokenizer.path} has {n} tokens, more than the vocab_size {c.vocab_size}")
    model = Phi(c)
    load(model, config.source)
    meta = {"step": 0, "run": str(config.out), "imported_from": config.source.resolve().name}
    with new_folder(config.out, [config.source]) as folder:
        write_checkpoint(folder, model, tokenizer, meta)
    print(f"imported {config.source} ({parameter_count(c):,} parameters) -> {config.out}")


def write_checkpoint(folder: Path, model: Phi, tokenizer: Tokenizer, meta: dict) -> None:
    """Write the parts of a checkpoint that inference reads: weights, tokenizer, meta.json."""
    save_file(model.state_dict(), folder / WEIGHTS_FILE)
    tokenizer.save(folder)
    shape = dataclasses.asdict(model.c)
    write_json(folder / "meta.json", {**meta, "tokenizer": tokenizer.fingerprint, "model": shape})


def parts(model: Phi) -> dict[str, torch.Tensor]:
    """Return views of the model's parameters with PhiForCausalLM's names and shapes."""
    C, M = model.c.width, model.c.mlp_width
    named = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.final_layernorm.weight": model.ln_f.weight,
        "model.final_layernorm.bias": model.ln_f.bias,
        "lm_head.weight": model.head.weight,
        "lm_head.bias": model.head.bias,
    }
    inward = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
    for i, block in enumerate(model.blocks):
        w_attn, w_mlp = block.w_out.split([C, M], dim=1)
        tensors = {
            "input_layernorm.weight": block.ln.weight,
            "input_layernorm.bias": block.ln.bias,
            "self_attn.dense.weight": w_attn,
            "self_attn.dense.bias": block.b_attn,
            "mlp.fc2.weight": w_mlp,
            "mlp.fc2.bias": block.b_mlp,
        }
        for kind, packed in (("weight", block.w_in), ("bias", block.b_in)):
            for name, part in zip(inward, packed.split([C, C, C, M])):
                tensors[f"{name}.{kind}"] = part
            if model.c.qk_norm:
                constant = torch.full((model.c.head_dim,), QK_NORM if kind == "weight" else 0.0)
                for name in QK_NORMS:
                    tensors[f"{name}.{kind}"] = constant.clone()
        named |= {f"model.layers.{i}.{name}": part for name, part in tensors.items()}
    return named


@torch.no_grad()
def load(model: Phi, folder: Path) -> None:
    """Copy the safetensors weights in `folder`, in one file or shards, into `model`.

    Raises UserError if a tensor is missing, unknown, misshapen or not finite.
    """
    mine, where = parts(model), {}  # {tensor name: open file}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path} cannot be read: {e}") from None
        where |= dict.fromkeys(file.keys(), file)
    for name in sorted(mine.keys() ^ where.keys()):
        problem = "is missing" if name in mine else "is not in this model"
        raise UserError(
            f"{folder}: tensor {name} {problem}; want exactly PhiForCausalLM's tensors in "
            ".safetensors files; convert other weights with transformers first"
        )
    for name, part in mine.items():
        tensor = where[name].get_tensor(name)
        got, want = list(tensor.shape), list(part.shape)
        if got != want:
            raise UserError(f"{folder}: {name} has shape {got}, but config.json wants {want}")
        if not tensor.isfinite().all():
            raise UserError(f"{folder}: {name} has NaN or inf; want finite weights")
        if any(norm in name for norm in QK_NORMS) and not tensor.equal(part):
            raise UserError(
                f"{folder}: {name} is not {part[0]:g} everywhere, which this model fixes; "
                "weights with trained QK-norm cannot be imported"
            )
        part.copy_(tensor)


def phi_config(c: ModelConfig, tokenizer: Tokenizer) -> dict:
    """Return PhiForCausalLM's config.json for the shape `c`."""
    rope = {"rope_theta": c.rope_theta, "partial_rotary_factor": rotary_factor(c)}
    return {
        "architectures": ["PhiForCausalLM"],
        **{key: FIXED[key][0] for key in FIXED if FIXED[key][0] is not None},
        **{theirs: getattr(c, ours) for theirs, ours in NAMES.items()},
        "num_key_value_heads": c.n_head,
        "attention_dropout": c.dropout,
        "resid_pdrop": c.dropout,
        "embd_pdrop": 0.0,
        "rope_parameters": {"rope_type": "default", **rope},  # read by transformers 5
        **rope,  # read by transformers 4 and others
        "dtype": "float32",
        "use_cache": True,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,  # no pad_token_id: it is never trained
    }


def rotary_factor(c: ModelConfig) -> float:
    """Return a factor for which transformers' int(head_dim * factor) is rotary_dim."""
    factor = c.rotary_dim / c.head_dim
    if int(c.head_dim * factor) < c.rotary_dim:  # the division rounded down
        factor = math.nextafter(factor, 1.0)
    return factor


def model_config(path: Path) -> ModelConfig:
    """Return the shape in a PhiForCausalLM config.json. Raises UserError for what Phi lacks: other
    activations, fewer key heads, scaled rotary embedding, tied or quantised weights, ..."""
    if not isinstance(h := read_json(path), dict):
        raise UserError(f"{path} is missing or is not a JSON object")

    def check(key: str, got, *allowed) -> None:
        if got not in allowed:
            want = " or ".join(map(repr, allowed))
            raise UserError(f"{path}: {key} is {got!r}, but this model supports only {want}")

    for key, values in FIXED.items():
        check(key, h.get(key, values[0]), *values)
    shape = {ours: h.get(theirs, getattr(ModelConfig, ours)) for theirs, ours in NAMES.items()}
    c = ModelConfig(**shape, rotary_dim=0)
    check("num_key_value_heads", h.get("num_key_value_heads"), None, c.n_head)
    check("head_dim", h.get("head_dim"), None, c.head_dim)
    drops = [h.get(key, 0.0) for key in ("attention_dropout", "resid_pdrop", "embd_pdrop")]
    dropout = drops[0]
    if drops != [dropout, dropout, 0]:
        dropout = 0.0
        print(f"{path}: dropout becomes 0: this model has one rate for attention and residual")
    rope = h.get("rope_parameters") or {}
    check("rope_type", rope.get("rope_type", "default"), "default")
    theta = rope.get("rope_theta", h.get("rope_theta", ModelConfig.rope_theta))
    factor = rope.get("partial_rotary_factor", h.get("partial_rotary_factor", 0.5))
    more = {"rope_theta": float(theta), "dropout": dropout}
    return ModelConfig(**shape, rotary_dim=int(c.head_dim * factor), **more)


def model_card(source: Path, model: ModelConfig, tokenizer: Tokenizer) -> str:
    """Return an export's README.md: what the model is and where it comes from."""
    lineage = {**checkpoint.read_meta(source), "weights_crc32": checkpoint.checksum(source)}
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [phi, code, nanophi]
---
A decoder of phi-1's architecture (`PhiForCausalLM`, arXiv 2306.11644) trained with nanophi:
{parameter_count(model):,} parameters in float32, for `AutoModelForCausalLM` and `AutoTokenizer`.
The tokenizer puts {len(tokenizer.start)} tokens before a prompt, as in training, and never reads
`{END_OF_TEXT}` in a text as the end-of-text token; use `eos_token_id` = {tokenizer.end_of_text}.
It completes code; it follows no instructions. Run what it writes in a sandbox only.

```json
{json.dumps(lineage, indent=2, ensure_ascii=False)}
```
"""


if __name__ == "__main__":
    run(main)

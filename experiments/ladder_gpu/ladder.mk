# The ladder for one H100: a bar is 1,300 steps of 65,536 tokens, 85M tokens. Not run on a GPU yet.
#
#   make ladder LADDER_SET=experiments/ladder_gpu LADDER=out/ladder_gpu sources=~/site-packages ...
#
# At half of the data sheet's roof (python -m bench.cost), large trains at 251k tokens/s, small at
# 637k: 340 s and 134 s per bar, plus a minute or two of scoring.
#
# Besides torch and triton the machine needs sentencepiece, tqdm, safetensors, matplotlib,
# scikit-learn and zstandard. If it cannot install them, bring wheels for its Python:
#   pip download --python-version 3.12 --only-binary=:all: -d wheels zstandard sentencepiece ...
#   pip install --no-index --find-links wheels --target out/packages zstandard sentencepiece ...
#   PYTHONPATH=out/packages make ladder PYTHON=python3 LADDER_SET=experiments/ladder_gpu ...
# Data can be made elsewhere: copy OUT/data and OUT/commands, keeping mtimes (cp -a, rsync -a).
rungs := raw filtered classified textbooks exercises replay varied blend damaged pairs mixture pruned80
bars := $(foreach s,s0 s1 s2,$(foreach r,$(rungs),$(r)-small-$(s)) \
  $(foreach r,raw filtered textbooks exercises mixture,$(r)-large-$(s)))
threads        := 8
base_steps     := 700
finetune_steps := 600

# 85M tokens are about 300 MB of code; with less, the model repeats some of it. Installed packages
# hold hundreds of megabytes.
raw_mb           := 400
heldout_mb       := 4
labels           := 5000
textbooks        := 16000
exercises        := 400000
heldout          := 500
unseen           := 200
# Must match small.toml and large.toml.
vocab_size       := 16384
tokenizer_mb     := 16
val_frac         := 0.01

# Problems to measure gold bits on; sets of problems to solve, and how many of each.
ranked           := 500
asked            := heldout $(HUMANEVAL:%=humaneval) $(MBPP:%=mbpp)
asked_limit      := 500
max_new_tokens   := 256

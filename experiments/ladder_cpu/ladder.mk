# The ladder for two CPU cores: 2,400 steps of 512 tokens, 1.2M tokens, a bar. Its 21 bars take
# about 80 minutes with `make -j2`: two commands at a time, one thread each.
bars := \
  raw-large-s0 textbooks-large-s0 base-large-s0 exercises-large-s0 raw-small-s0 filtered-small-s0 \
  classified-small-s0 textbooks-small-s0 base-small-s0 exercises-small-s0 exercises-small-s1 \
  damaged-small-s0 pruned95-small-s0 pruned90-small-s0 pruned85-small-s0 pruned80-small-s0 \
  pairs-small-s0 damaged-large-s0 varied-large-s0 classified-large-s0 filtered-large-s0
threads        := 1
base_steps     := 250
finetune_steps := 2150

raw_mb         := 40
heldout_mb     := 0.3
labels         := 1000
textbooks      := 2000
exercises      := 30000
heldout        := 500
unseen         := 200
# As in small.toml and large.toml.
vocab_size     := 2048
tokenizer_mb   := 4
val_frac       := 0.02

max_new_tokens   := 128
robustness_limit := 60

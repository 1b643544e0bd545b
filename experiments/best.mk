# The best model from one hour on two CPU cores. It trains on the ladder's mixture (plain and varied
# exercises, function/docstring pairs, textbooks, filtered code), decontaminated against the
# benchmarks, then some more steps with most exercises' arguments renamed. LOG.md says how both were
# chosen.

BEST := out/best
BENCHMARKS = --benchmarks $(HUMANEVAL) --benchmarks $(MBPP)
SOURCES := plain/train varied/train pairs textbooks filtered
RENAMED := plain/renamed varied/renamed pairs textbooks filtered
WEIGHTS := 0.25 0.25 0.2 0.1 0.2
TEMPERATURES := 0.4 0.8
sampled = eval.$(1) --checkpoint $(BEST)/run --sandbox $(SANDBOX) --problems $(2) --out $(@D)

.PHONY: best best-files

best:  ## train the best one-hour model and score it (HUMANEVAL= MBPP=)
best: $(foreach x,humaneval mbpp,$(BEST)/$(x)/results.json $(BEST)/$(x)_greedy/results.json) \
  $(BEST)/gold/mbpp.json

best-files:
	@[ -f "$(HUMANEVAL)" -a -f "$(MBPP)" ] || { echo >&2 \
	  "error: want both files: make best HUMANEVAL=HumanEval.jsonl.gz MBPP=mbpp.jsonl"; exit 2; }

$(BEST)/data/summary.json: | best-files $(VENV)
	$(PYTHON) -m data.exercises --out $(@D)/plain --concepts --count 25000 --unseen 200 $(BENCHMARKS)
	$(PYTHON) -m data.exercises --out $(@D)/varied --forms varied --concepts --count 20000 \
	  --unseen 200 $(BENCHMARKS)
	$(PYTHON) -m data.synthesize textbooks --out $(@D)/textbooks --count 2000
	$(PYTHON) -m data.collect --out $(@D)/raw --max_mb 80
	$(PYTHON) -m experiments.pairs --source $(@D)/raw --out $(@D)/pairs
	$(PYTHON) -m data.filter --source $(@D)/raw --out $(@D)/filtered
	for x in $(SOURCES); do $(PYTHON) -m data.decontaminate --tau 0.8 \
	  --source $(@D)/$$x --out $(@D)/clean/$$x $(BENCHMARKS) || exit; done
	$(PYTHON) -m tokenizer.train --out $(@D)/tokenizer --vocab_size 3072 \
	  $(SOURCES:%=--source $(@D)/clean/%)
	$(PYTHON) -m data.pack --tokenizer $(@D)/tokenizer --out $(BEST)/tokens --val_frac 0.01 \
	  $(SOURCES:%=--source $(@D)/clean/%) $(WEIGHTS:%=--weight %)
	for x in plain varied; do $(PYTHON) -m experiments.rename --source $(@D)/clean/$$x/train \
	  --words $(@D)/raw --out $(@D)/clean/$$x/renamed || exit; done
	$(PYTHON) -m data.pack --tokenizer $(@D)/tokenizer --out $(BEST)/tokens_renamed --val_frac 0.01 \
	  $(RENAMED:%=--source $(@D)/clean/%) $(WEIGHTS:%=--weight %)
	cp $(BEST)/tokens/summary.json $@

train_best = $(PYTHON) train.py experiments/best_cpu.toml --out $(@D) --resume --restart
$(BEST)/base/summary.json: $(BEST)/data/summary.json experiments/best_cpu.toml | best-files
	$(train_best) --data $(BEST)/tokens
$(BEST)/run/summary.json: $(BEST)/base/summary.json
	$(train_best) --data $(BEST)/tokens_renamed --init_from $(BEST)/base --max_steps 800

$(BEST)/gold/mbpp.json: $(BEST)/run/summary.json
	for x in humaneval=$(HUMANEVAL) mbpp=$(MBPP) judge=eval/judge.jsonl; do $(PYTHON) -m eval.mutants \
	  --problems $${x#*=} --out $(BEST)/mutants/$${x%=*}.jsonl --sandbox $(SANDBOX) || exit; done
	$(PYTHON) -m eval.bits --checkpoint $(BEST)/run --out $(@D) \
	  $(foreach x,humaneval judge mbpp,--problems $(BEST)/mutants/$(x).jsonl)

$(BEST)/humaneval_greedy/results.json: $(BEST)/run/summary.json
	$(PYTHON) -m $(call sampled,humaneval,$(HUMANEVAL))
$(BEST)/mbpp_greedy/results.json: $(BEST)/run/summary.json
	$(PYTHON) -m $(call sampled,mbpp,$(MBPP))

# Use the temperature with the best pass@100 on held-out exercises; it solves 0 of unseen families.
tuned := $(TEMPERATURES:%=$(BEST)/heldout_%)
$(tuned:=/results.json): $(BEST)/heldout_%/results.json: $(BEST)/run/summary.json
	$(PYTHON) -m $(call sampled,humaneval,$(BEST)/data/plain/heldout.jsonl) --limit 30 \
	  --samples_per_problem 100 --temperature $*
$(BEST)/humaneval/results.json: $(tuned:=/results.json)
	$(PYTHON) -m $(call sampled,humaneval,$(HUMANEVAL)) --samples_per_problem 100 $(tuned:%=--tuned %)
$(BEST)/mbpp/results.json: $(tuned:=/results.json)
	$(PYTHON) -m $(call sampled,mbpp,$(MBPP)) --samples_per_problem 100 $(tuned:%=--tuned %)

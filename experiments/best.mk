# The best model of an hour on two CPU cores: exercises in plain and varied forms, functions with
# their docstrings, textbooks and filtered code, mixed, without whatever resembles a benchmark's
# problem. The recipe was chosen by the ladder's scores on eval/judge.jsonl (LOG.md).

BEST := out/best
BENCHMARKS = --benchmarks $(HUMANEVAL) --benchmarks $(MBPP)
SOURCES := plain/train varied/train pairs textbooks filtered
WEIGHTS := 0.3 0.3 0.2 0.1 0.1
TEMPERATURES := 0.4 0.7 1.0

.PHONY: best best-data

best: $(BEST)/humaneval/results.json $(BEST)/mbpp/results.json $(BEST)/gold/mbpp.json  ## the best model of an hour (HUMANEVAL= MBPP=)

best-data: $(BEST)/data/summary.json
$(BEST)/data/summary.json: | $(VENV)
	@[ -f "$(HUMANEVAL)" -a -f "$(MBPP)" ] || { echo >&2 \
	  "error: make best HUMANEVAL=HumanEval.jsonl.gz MBPP=mbpp.jsonl wants both files"; exit 2; }
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
	cp $(BEST)/tokens/summary.json $@

$(BEST)/run/summary.json: $(BEST)/data/summary.json experiments/best_cpu.toml
	$(PYTHON) train.py experiments/best_cpu.toml --resume --restart

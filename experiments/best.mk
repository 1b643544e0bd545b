# The best score of about an hour on two CPU cores (LOG.md): exercises in many forms, textbooks and
# filtered code, in one pass, without whatever resembles a benchmark's problem.

BEST := out/best
BENCHMARKS = --benchmarks $(HUMANEVAL) --benchmarks $(MBPP)

.PHONY: best

best: $(BEST)/humaneval/results.json $(BEST)/mbpp/results.json  ## the best score of an hour (HUMANEVAL= MBPP=)

$(BEST)/data/summary.json: | $(VENV)
	@[ -f "$(HUMANEVAL)" -a -f "$(MBPP)" ] || { echo >&2 \
	  "error: make best HUMANEVAL=HumanEval.jsonl.gz MBPP=mbpp.jsonl wants both files"; exit 2; }
	$(PYTHON) -m data.exercises --out $(@D)/exercises --forms varied --concepts --count 120000 \
	  --unseen 200 $(BENCHMARKS)
	$(PYTHON) -m data.synthesize textbooks --out $(@D)/textbooks --count 4000
	$(PYTHON) -m data.collect --out $(@D)/raw --max_mb 40
	$(PYTHON) -m data.filter --source $(@D)/raw --out $(@D)/filtered
	for x in exercises/train textbooks filtered; do $(PYTHON) -m data.decontaminate --tau 0.8 \
	  --source $(@D)/$$x --out $(@D)/clean/$$x $(BENCHMARKS) || exit; done
	$(PYTHON) -m tokenizer.train --source $(@D)/clean/exercises/train --out $(@D)/tokenizer \
	  --source $(@D)/clean/textbooks --source $(@D)/clean/filtered --vocab_size 3072
	$(PYTHON) -m data.pack --tokenizer $(@D)/tokenizer --out $(BEST)/tokens --val_frac 0.01 \
	  --source $(@D)/clean/exercises/train --epochs 1 --source $(@D)/clean/textbooks --epochs 1 \
	  --source $(@D)/clean/filtered --epochs 0.5
	cp $(BEST)/tokens/summary.json $@

$(BEST)/run/summary.json: $(BEST)/data/summary.json experiments/best_cpu.toml
	$(PYTHON) train.py experiments/best_cpu.toml --resume --restart

$(BEST)/humaneval/results.json: $(BEST)/run/summary.json
	$(PYTHON) -m eval.humaneval --problems $(HUMANEVAL) --checkpoint $(<D) --out $(@D) \
	  --sandbox $(SANDBOX)

$(BEST)/mbpp/results.json: $(BEST)/run/summary.json
	$(PYTHON) -m eval.mbpp --problems $(MBPP) --protocol docstring --checkpoint $(<D) --out $(@D) \
	  --sandbox $(SANDBOX)

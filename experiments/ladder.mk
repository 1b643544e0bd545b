# The same model on better and better data.

LADDER    ?= out/ladder
HUMANEVAL ?=  # your files of the benchmarks; best.mk wants both
MBPP      ?=

.PHONY: ladder report

ladder: $(VENV)  ## the same model on better and better data, and its report (80 minutes)
	$(PYTHON) -m experiments.ladder experiments/ladder_cpu --out $(LADDER) --sandbox $(SANDBOX) \
	  $(if $(HUMANEVAL),--humaneval $(HUMANEVAL)) $(if $(MBPP),--mbpp $(MBPP))
	$(MAKE) report

report: $(VENV)  ## the ladder's report again: a page, and figures under records/
	$(PYTHON) -m tools.report --ladder $(LADDER) --png records/ladder_cpu

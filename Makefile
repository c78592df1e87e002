# make report                          set up, run the default grid, build the book
# make report GRID=workflow/grids/cifar10.yml
# make report PROFILE=slurm            the same on a cluster (workflow/profiles/slurm/config.yaml has its settings)
# make report OPTIONS="--dry-run"      with further options of Snakemake
# make status                          in another terminal: how far a run is
# make record GRID=...                 put a finished grid's results into book/results, to be committed
# make test                            set up, lint, test
# make benchmarks                     measure every ratio to other people's code, for the book (some 20 minutes)
# make torture                         kill a tiny grid again and again, or damage its files, and compare what it ends with
# make lock                            resolve the dependencies anew

GRID    ?= workflow/grids/quick.yml
PROFILE ?= local
PYTHON  ?= python3
CORES   ?= all
ENV     := .venv
RUN     := $(ENV)/bin/python

.PHONY: benchmarks torture report status test record lock clean
.DEFAULT_GOAL := report

report: $(ENV)/ready
	@$(RUN) workflow/report.py $(GRID) --profile $(PROFILE) --cores $(CORES) $(if $(OPTIONS),-- $(OPTIONS))

status: $(ENV)/ready
	@$(RUN) workflow/report.py --status

record: $(ENV)/ready
	@$(RUN) -m lthlib record $(GRID)

test: $(ENV)/ready
	@$(RUN) -m ruff check --no-cache .
	@$(RUN) -m ruff format --check .
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist loadfile tests

$(ENV)/ready: requirements.lock workflow/bootstrap.py workflow/uv.lock.txt
	@$(PYTHON) workflow/bootstrap.py $(ENV)
	@touch $@

benchmarks: $(ENV)/ready
	@$(RUN) benchmarks/ratios.py --record

torture: $(ENV)/ready
	@$(RUN) tests/torture.py $(OPTIONS)

lock: $(ENV)/ready
	uv pip compile pyproject.toml --group test --universal --python-version 3.11 --generate-hashes --no-annotate \
	  --no-emit-index-url --no-header --upgrade -o requirements.lock

clean:
	rm -rf _build book/_generated .snakemake

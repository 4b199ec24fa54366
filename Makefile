# miniai. On a fresh machine `make demo` or `make test` is all there is to type.
VENV = .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
LESSONS = $(wildcard nbs/10_*.ipynb nbs/11_*.ipynb nbs/12_*.ipynb nbs/13_*.ipynb)

.PHONY: help setup demo test stress lessons data bench docs lab edit export clean

help: ## list these commands (the default)
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## install everything into .venv, if that is not done yet; CPU=1 leaves CUDA out

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@CPU=$(CPU) sh .ci/setup.sh $(MAKECMDGOALS)

demo: $(READY) ## train a diffusion model on pictures of clothes and draw new ones, into _run/
	@$(BIN)/python .ci/lesson.py nbs/12_ddpm.ipynb

test: $(READY) ## check that package and notebooks agree, run tests/, then run every notebook
	@$(BIN)/python tests/run.py

stress: $(READY) ## break fits on purpose, by the hundred (kills, interrupts, a full disk), and count: ten minutes
	@$(BIN)/python tests/stress.py

lessons: $(READY) ## run the lessons on dropout and diffusion (10 to 13) in full for this machine, into _run/
	@$(BIN)/python .ci/lesson.py $(LESSONS)

data: ## fetch Fashion-MNIST where apt is there, without root
	@sh .ci/data.sh

bench: $(READY) ## measure what the Learner and the loaders cost
	@for f in tests/bench/learner.py tests/bench/data.py; do echo "== $$f"; $(BIN)/python $$f || exit 1; done

docs: $(READY) ## build the website into _site/
	@sh .ci/docs.sh

lab: $(READY) ## open copies of the notebooks in JupyterLab, in _lab/: yours to change
	@$(BIN)/python .ci/lab.py && $(BIN)/jupyter lab $(LAB) _lab

edit: $(READY) ## open the notebooks themselves in JupyterLab, to change the package
	@$(BIN)/jupyter lab $(LAB) nbs

export: $(READY) ## clean the notebooks, put back committed outputs where a run failed or was quick, and write the package
	@$(BIN)/nbdev-clean && $(BIN)/python .ci/mend.py && $(BIN)/nbdev-export

clean: ## remove what the commands above made, but keep .venv and your notebooks in _lab/
	@rm -rf _run nbs/_run _site build *.egg-info .pytest_cache .ruff_cache
	@find . \( -name .venv -o -name _lab \) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

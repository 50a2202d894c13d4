# Two commands to begin with: `make demo` and `make test`. `make help` lists all.

CC ?= cc
PYTHON ?= python3
PY = .venv/bin/python
DEMO = out/quickstart
SET = seeds4
# the flag by which the compiler builds for this machine; nothing if it knows none
NATIVE = $(shell for flag in -march=native -mcpu=native; do echo 'int main(void) { return 0; }' | $(CC) $$flag -x c -o /dev/null - 2> /dev/null && echo $$flag && break; done)
.PHONY: help demo train-quickstart train-quickstart-base test test-interop lint fuzz bench bench-c ablation results run runportable runfast runomp rundebug clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*##/  make \1 |/' | column -t -s '|'

demo: run $(DEMO)/model.bin ## two 260K models, with a future head and without, train for three minutes; then a story from C
	@echo
	@echo "With and without the future head ($(PY) compare.py $(DEMO)_base $(DEMO) has all):"
	@$(PY) compare.py $(DEMO)_base $(DEMO) 2> /dev/null | sed -n 1p
	@echo
	@echo "Next: make test; the README's real stories and four set-ups; or this model again:"
	@echo "  ./run $(DEMO)/model.bin -t 0.5 -n 0 -i \"One day, Mia lost her\""
	@echo
	@echo "A story by the model in $(DEMO):"
	@echo
	@./run $(DEMO)/model.bin -t 0.5 -s 1 -n 0

test: .venv/test-ready ## the whole test suite
	$(PY) -m pytest

test-interop: .venv/interop-ready ## compare stories with llama.cpp, which is built first (20 to 40 minutes on two cores)
	$(PY) -m pytest tests/test_gguf.py

lint: .venv/test-ready ## ruff, and the C compiler's warnings as errors
	$(PY) -m ruff check
	for flags in -O2 "-O3 $(NATIVE)" "-O2 -DSCALAR"; do \
	    $(CC) -std=c11 -Wall -Wextra -Wpedantic -Werror $$flags -pthread -o /dev/null run.c -lm || exit 1; \
	    $(CC) -std=c11 -Wall -Wextra -Wpedantic -Werror -Wno-unknown-pragmas $$flags -c -o /dev/null step/kernels.c || exit 1; done

run: run.c ## build run, inference in C, for this machine's processor
	$(CC) -O3 $(NATIVE) -pthread -o run run.c -lm

runportable: run.c ## build run for any processor of this kind, to copy it elsewhere
	$(CC) -O3 -pthread -o run run.c -lm

runfast: run ## the same as make run

runomp: run ## the same, under llama2.c's name: every build has threads (OMP_NUM_THREADS=4 ./run ..., or -j 4)

rundebug: run.c ## build run with address and undefined-behaviour sanitizers
	$(CC) -g -O1 -Wall -Wextra -DSEPARATE_BUFFERS -fsanitize=address,undefined -pthread -o run run.c -lm

fuzz: .venv/test-ready ## fuzz the Python readers with hypothesis (a minute), then run.c's for FUZZ_SECONDS (60) with clang's libFuzzer
	$(PY) -m pytest tests/test_fuzz.py --hypothesis-profile=fuzz
	@printf 'int LLVMFuzzerTestOneInput(const char *d, long n) { return !d && n; }' | clang -x c -fsanitize=fuzzer,address -o /dev/null - 2>/dev/null \
	|| { echo "make fuzz needs clang with libFuzzer (Debian: apt-get install clang libclang-rt-dev)"; exit 1; }
	mkdir -p build/corpus
	clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -pthread -o build/fuzz tests/c/fuzz.c -lm
	build/fuzz -max_total_time=$${FUZZ_SECONDS:-60} -max_len=20000 -close_fd_mask=3 -detect_leaks=0 -rss_limit_mb=2000 \
	    -artifact_prefix=build/ build/corpus tests/c/corpus

bench: .venv/test-ready ## speed and memory of training steps by path, heads, vocabulary and length, into doc/training.md (15 minutes)
	$(PY) -m bench.training

bench-c: .venv/test-ready ## tokens/s of run.c by size, precision and threads, into doc/decode.md; LLAMA2C_RUN=PATH and others take part (20 minutes, 1 GB)
	$(PY) -m bench.decoding decode

ablation: .venv/test-ready ## train SET (seeds4, objectives) with several seeds and compare: hours; continues where it stopped
	$(PY) ablate.py $(SET)

results: .venv/test-ready ## redraw the tables and plots of doc/results.md and doc/objectives.md from doc/runs (a minute)
	$(PY) compare.py doc/runs/seeds4.jsonl --markdown "doc/results.md#seeds4" --plots doc/seeds4 --draw ends difference ntp_step ntp_seconds val_consistency_1 val_nitp_1 > /dev/null
	$(PY) compare.py doc/runs/confirm.jsonl --markdown "doc/results.md#confirm" --plots doc/confirm --draw ends ntp_step > /dev/null
	$(PY) compare.py doc/runs/fair_pairs.jsonl --baseline base --markdown "doc/results.md#fair_pairs" --plots doc/fair --draw ends difference ntp_step > /dev/null
	for search in grid warm; do \
	    $(PY) compare.py doc/runs/fair_$$search.jsonl --along learning_rate --baseline base --markdown "doc/results.md#fair_$$search" > /dev/null || exit 1; done
	$(PY) compare.py doc/runs/early.jsonl --baseline base --markdown "doc/results.md#early" > /dev/null
	$(PY) compare.py doc/runs/free.jsonl --along vocab_size --baseline base --markdown "doc/results.md#free" > /dev/null
	$(PY) compare.py doc/runs/bags.jsonl --baseline base --markdown "doc/results.md#bags" > /dev/null
	$(PY) compare.py doc/runs/induction_stories.jsonl --baseline base --until val/acc_again=half val/acc_name=half --judge val/acc_again val/acc_name --markdown "doc/results.md#induction_stories" --plots doc/induction --draw val_acc_again difference > /dev/null
	for set in little little2m; do \
	    $(PY) compare.py doc/runs/$${set}_tuned.jsonl --along train_fraction --best --baseline base --markdown "doc/results.md#$${set}_tuned" --plots doc/$$set > /dev/null || exit 1; \
	    $(PY) compare.py doc/runs/$${set}_untuned.jsonl --along train_fraction --best --baseline base --markdown "doc/results.md#$${set}_untuned" > /dev/null || exit 1; done
	$(PY) compare.py doc/runs/little_dropout.jsonl --along dropout --best --baseline base --markdown "doc/results.md#little_dropout" > /dev/null
	$(PY) compare.py doc/runs/objectives.jsonl --markdown "doc/objectives.md#map" --plots doc/objectives --draw ends > /dev/null

clean: ## remove what was built; keep data, runs and .venv
	rm -rf run build .pytest_cache .ruff_cache $$(find . -name __pycache__ -not -path "./.venv/*")

# --- the steps of the above; each is done once ---

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, found %s; name another: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

.venv/test-ready: .venv/ready requirements-dev.txt requirements-compare.txt requirements-export.txt requirements-data.txt requirements-tensorboard.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

.venv/interop-ready: .venv/test-ready requirements-interop.txt
	$(PY) -m pip install -r requirements-interop.txt
	touch $@

data/toy/tok512/val.bin: | .venv/ready
	$(PY) tinystories.py toy --vocab_size=512

# Both models at the same time, with a core each; only the first one talks.
$(DEMO)/model.bin: | .venv/ready data/toy/tok512/val.bin
	@$(MAKE) --no-print-directory -j2 train-quickstart train-quickstart-base
	$(PY) export.py $(DEMO)/ckpt.pt $@

train-quickstart:
	OMP_NUM_THREADS=1 $(PY) train.py config/quickstart.py --init_from=auto

train-quickstart-base:
	@OMP_NUM_THREADS=1 $(PY) train.py config/quickstart_base.py --init_from=auto > /dev/null

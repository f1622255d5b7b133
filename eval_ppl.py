"""Perplexity of a causal language model on WikiText-2 or a text file.

    python eval_ppl.py --model opt-6.7b-admm-grad-0.5

The protocol is that of the published tables (GPTQ, SparseGPT, Wanda): join the rows of WikiText-2's
test split by blank lines, tokenise them once, cut windows of `seqlen` tokens that do not overlap,
drop the last, incomplete window, and take exp of the mean negative log-likelihood. This file knows
nothing of pruning; `admm_prune.py` imports its texts, loading and devices.
"""

import argparse
import sys
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_HELP = "auto: checkpoint's; CPU, .gguf: float32"


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
    windows_at_once = max(1, 2**29 // (vocabulary * tokens.shape[1]))  # 1 GiB of logits in 16 bits
    losses = []
    with offload_blocks(model, device):
        for windows in tqdm(tokens.to(device).split(windows_at_once), "perplexity"):
            logits = model(windows, use_cache=False).logits  # (windows, seqlen, vocabulary)
            for window, window_logits in zip(windows, logits, strict=True):
                losses.append(F.cross_entropy(window_logits[:-1].float(), window[1:]))
    return float(torch.stack(losses).cpu().double().mean().exp())  # MPS has no float64


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder blocks: the module list in the decoder that has the most parameters."""
    for part in (model.get_decoder(), model):  # of the whole model if the decoder has no list
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
        if lists:
            return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
    raise ValueError(f"{type(model).__name__} has no list of decoder blocks")


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers."""
    return list(chain(module.parameters(), module.buffers()))


@contextmanager
def offload_blocks(model: nn.Module, device: torch.device):
    """Let a model that lies on the host compute on the device, until the context ends.

    What is outside the blocks lies on the device until then. A block moves there for its forward;
    afterwards its data on the host, which have not changed, are put back, or when the context ends
    if a GPU has room for the whole model.
    """
    on_host = {tensor: tensor.data for tensor in tensors_of(model)}
    blocks = find_blocks(model)

    def move(block, args):
        for tensor in tensors_of(block):
            tensor.data = tensor.data.to(device)  # nothing to do for a block that stayed

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


def check_seqlen(config, seqlen: int) -> None:
    """Raise a ValueError if a sequence is longer than the positions that the model has."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and seqlen > positions:
        raise ValueError(f"seqlen is {seqlen}, but the model has only {positions} positions")


def locate(name: str) -> dict:
    """Return the arguments of `from_pretrained` for a hub id, a folder or a .gguf file."""
    path = Path(name)
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": name}


def load_tokenizer(name: str, seqlen: int):
    """Return the tokenizer of a model; raise a ValueError if its config tells that it is unfit."""
    config = AutoConfig.from_pretrained(**locate(name))
    if config.is_encoder_decoder:  # otherwise the decoder of BART is loaded alone
        raise ValueError(f"{name} is an encoder-decoder model; only decoder-only ones will do")
    check_seqlen(config, seqlen)
    return AutoTokenizer.from_pretrained(**locate(name))


def load_model(name: str, dtype: str, device: torch.device) -> nn.Module:
    """Return the causal LM on the host, in one of DTYPES.

    "auto" is the checkpoint's, but float32 for a .gguf file and on a CPU, slow in 16 bits.
    """
    where = locate(name)
    is_gguf = "gguf_file" in where
    if dtype == "auto" and (is_gguf or device.type == "cpu"):
        dtype = "float32"
    if is_gguf:
        where["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = AutoModelForCausalLM.from_pretrained(
        **where, dtype=dtype, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"{name} lacks weights, such as {min(info['missing_keys'])}")
    if is_gguf:  # the weights are no longer quantised, and can be saved
        model.config.quantization_config = None
        model.hf_quantizer = None
    return model


def load_texts(source: str, split: str, seed: int = 0):
    """Return the texts of "c4" (streamed and shuffled), "wikitext2" or a text file.

    WikiText-2 is one text, its rows joined by blank lines, as in GPTQ, SparseGPT and Wanda.
    """
    import datasets  # here, so that whoever imports the solver does not need it

    if source == "c4":
        stream = datasets.load_dataset("allenai/c4", "en", split=split, streaming=True)
        return (document["text"] for document in stream.shuffle(seed=seed, buffer_size=1000))
    if source == "wikitext2":
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return ["\n\n".join(rows["text"])]
    return [Path(source).read_text(encoding="utf-8")]


def tokenize(tokenizer, text: str) -> Tensor:
    """Return the token ids of a text, (length,) int64, with the tokenizer's special tokens."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def calibration_tokens(
    source: str, tokenizer, nsamples: int = 128, seqlen: int = 2048, seed: int = 0
) -> Tensor:
    """Return calibration tokens, (nsamples, seqlen) int64; the same seed gives the same tokens.

    For "c4", they are a random crop of each of the first `nsamples` shuffled documents longer than
    `seqlen`, as in the paper; for "wikitext2" (the train split) or a text file, random windows.

    Raises: ValueError if there is too little text; OSError if it cannot be read.
    """
    texts = islice(load_texts(source, "train", seed), 1000 * nsamples)  # or give up
    tokenized = (tokenize(tokenizer, text) for text in texts)
    long_enough = list(islice((ids for ids in tokenized if len(ids) > seqlen), nsamples))
    if source != "c4":  # there is one text: crop it nsamples times
        long_enough *= nsamples
    if len(long_enough) < nsamples:
        raise ValueError(f"{source} lacks text for {nsamples} sequences of {seqlen} tokens")
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for ids in long_enough:
        start = int(torch.randint(len(ids) - seqlen + 1, (), generator=generator))
        samples.append(ids[start : start + seqlen])
    return torch.stack(samples)


def evaluation_tokens(source: str, tokenizer, seqlen: int, limit: int | None = None) -> Tensor:
    """Return the windows of "wikitext2" (test split) or a text file, (windows, seqlen) int64.

    The limit is a number of windows. Raises: as `calibration_tokens`.
    """
    [text] = load_texts(source, "test")
    ids = tokenize(tokenizer, text)
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)[:limit]
    if len(windows) == 0:
        raise ValueError(f"{source} has {len(ids)} tokens, but one window needs {seqlen}")
    return windows


@contextmanager
def one_line_errors(program: str):
    """Exit with one line for what arguments, files or memory cause; let other errors through."""
    try:
        yield
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        sys.exit(f"{program}: " + str(error).strip().partition("\n")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of a causal language model.")
    add = parser.add_argument
    add("--model", required=True, help="hub id, folder or .gguf file")
    add("--dataset", default="wikitext2", help="wikitext2 or a text file")
    add("--seqlen", type=int, default=2048, help="tokens in a window")
    add("--limit", type=int, help="use only the first LIMIT windows")
    add("--device", help="default: cuda if there is a GPU, else cpu")
    add("--dtype", choices=DTYPES, default="auto", help=DTYPE_HELP)
    args = parser.parse_args()
    if args.seqlen < 2:
        parser.error("--seqlen must be at least 2")
    with one_line_errors("eval_ppl.py"):
        device = select_device(args.device)
        tokenizer = load_tokenizer(args.model, args.seqlen)
        windows = evaluation_tokens(args.dataset, tokenizer, args.seqlen, args.limit)
        model = load_model(args.model, args.dtype, device)
        result = perplexity(model, windows, device)
    print(f"perplexity {result:.3f} on {args.dataset}: {len(windows)} windows of {args.seqlen}")


if __name__ == "__main__":
    main()

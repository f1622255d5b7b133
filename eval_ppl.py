"""Perplexity of a causal LM on WikiText-2, C4 or a text file, one decoder block at a time.

    python eval_ppl.py --model facebook/opt-6.7b
    python eval_ppl.py --model opt-6.7b-admm-grad-0.5 --dataset c4

The protocol is that of the published tables (GPTQ, SparseGPT, Wanda): join the rows of WikiText-2's
test split by blank lines, tokenise them once, cut windows of `seqlen` tokens that do not overlap,
drop the last, incomplete window, and take exp of the mean negative log-likelihood. Only the first
window begins with a BOS token, if the tokenizer adds one. The model may be larger than the memory
of the GPU.
"""

import argparse
import time
from itertools import islice

from torch import Tensor

import admm_prune as ap


def evaluation_tokens(
    source: str, tokenizer, seqlen: int = 2048, limit: int | None = None
) -> Tensor:
    """Return the windows of a text, (windows, seqlen) int64.

    Args:
        source: "wikitext2" (test split), "c4" (at most 256 windows of the first 1100 validation
            documents, as in SparseGPT) or the path of a text file.
        limit: use only the first `limit` windows.

    Raises: ValueError if the text cannot be read or has fewer than `seqlen` tokens.
    """
    split = "validation" if source == "c4" else "test"
    with ap.error_context(f"cannot read {source}", Exception):
        documents = islice(ap.load_documents(source, split), 1100)  # other sources are one text
        ids = ap.tokenize(tokenizer, " ".join(documents))
    count = len(ids) // seqlen
    if source == "c4":
        count = min(count, 256)
    if limit is not None:
        count = min(count, limit)
    if count == 0:
        raise ValueError(f"{source} has {len(ids)} tokens, but one window needs {seqlen}")
    return ids[: count * seqlen].view(count, seqlen)


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of a causal language model.")
    parser.add_argument("--model", required=True, help="hub id, folder or .gguf file")
    parser.add_argument("--dataset", default="wikitext2", help="wikitext2, c4 or a text file")
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT windows")
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    dtype_help = "auto: float32 on a CPU or from a .gguf file, else the checkpoint's"
    parser.add_argument("--dtype", choices=ap.DTYPES, default="auto", help=dtype_help)
    args = parser.parse_args()
    if args.seqlen < 2 or (args.limit is not None and args.limit < 1):
        parser.error("--seqlen must be at least 2 and --limit at least 1")
    began = time.perf_counter()
    with ap.command_line("eval_ppl.py"):
        device = ap.select_device(args.device)
        skeleton, tokenizer = ap.load_skeleton(args.model)
        seqlen = ap.limit_seqlen(args.seqlen, skeleton)
        windows = evaluation_tokens(args.dataset, tokenizer, seqlen, args.limit)
        model = ap.load_model(args.model, args.dtype, device)
        result = ap.perplexity(model, windows, device)
    print(
        f"perplexity {result:.3f} on {args.dataset}: {len(windows)} windows of {seqlen}, "
        f"{windows.numel()} tokens, {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
